import stat
from pathlib import Path

import pytest

from edge_agent.api.credentials import admin_token, bearer, state_folder
from shared.config import InvalidSettings


def test_admin_token_is_made_once_and_private(tmp_path: Path) -> None:
    """S-09: the first start makes it, the next ones read it; nobody else can."""
    folder = tmp_path / "state" / "causeway"

    token = admin_token(folder)

    assert admin_token(folder) == token
    assert len(token) >= 40
    assert stat.S_IMODE((folder / "admin.token").stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert [path.name for path in folder.iterdir()] == ["admin.token"]


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o602])
def test_a_token_that_others_could_read_is_refused(tmp_path: Path, mode: int) -> None:
    """Refused rather than trusted; the error says what to do."""
    admin_token(tmp_path)
    (tmp_path / "admin.token").chmod(mode)

    with pytest.raises(InvalidSettings, match="chmod 600"):
        admin_token(tmp_path)


def test_a_state_folder_that_cannot_be_is_named(tmp_path: Path) -> None:
    """A file where the folder should be."""
    (tmp_path / "state").write_text("")

    with pytest.raises(InvalidSettings) as error:
        admin_token(tmp_path / "state")

    assert error.value.param == "state_dir"


@pytest.mark.parametrize(
    ("env", "folder"),
    [
        ({}, "/home/u/.local/state/causeway"),
        ({"XDG_STATE_HOME": "/s"}, "/s/causeway"),
        ({"XDG_STATE_HOME": "s"}, "/home/u/.local/state/causeway"),
    ],
)
def test_state_lies_where_xdg_says(env: dict[str, str], folder: str) -> None:
    """Relative folders are to be ignored, the convention says."""
    assert state_folder(env, Path("/home/u")) == Path(folder)


def test_bearer_reads_the_one_scheme() -> None:
    """Case of the scheme does not matter, the scheme does."""
    assert bearer({"authorization": "bEaReR  k "}) == "k"
    assert bearer({"authorization": "Digest k"}) == ""
