import stat
from pathlib import Path

import pytest

from edge_agent.api.credentials import Keys, add_key, admin_token, bearer, hash_of, state_folder
from shared.config import InvalidSettings
from shared.errors import Unauthorized


def test_a_made_key_opens_and_only_its_hash_is_kept(tmp_path: Path) -> None:
    """Two keys in one file, both good; the file, readable by its owner alone, holds neither."""
    file = tmp_path / "new" / "keys"
    made = [add_key(file), add_key(file)]

    keys = Keys.read(file)

    for key in made:
        keys.check({"authorization": f"Bearer {key}"})
        assert key not in file.read_text()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert len(set(made)) == 2


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "Bearer",
        "Bearer ",
        "Bearer wrong",
        "Basic {key}",
        "{key}",
        "Bearer {key}x",
        "Bearer {hash}",
        "Bearer \xe9",
    ],
)
def test_other_credentials_do_not(tmp_path: Path, header: str | None) -> None:
    """Missing, wrong, in another scheme, or the stored hash itself."""
    file = tmp_path / "keys"
    key = add_key(file)
    headers = {} if header is None else {"authorization": header.format(key=key, hash=hash_of(key))}

    with pytest.raises(Unauthorized) as error:
        Keys.read(file).check(headers)

    assert key not in error.value.message


@pytest.mark.parametrize("content", ["", "# nothing\n", "secret\n", "A" * 64, "\xe9"])
def test_a_file_without_proper_hashes_is_refused(tmp_path: Path, content: str) -> None:
    """A plain key in the file is named by line, and not quoted."""
    file = tmp_path / "keys"
    file.write_text(content, "latin-1")

    with pytest.raises(InvalidSettings) as error:
        Keys.read(file)

    assert error.value.param == "keys"
    assert "secret" not in error.value.message


def test_comments_are_allowed(tmp_path: Path) -> None:
    """A line may say whose key it is."""
    file = tmp_path / "keys"
    file.write_text(f"# team\n{hash_of('k')}  # of the laptop\n")

    Keys.read(file).check({"authorization": "bearer k"})


def test_admin_token_is_made_once_and_private(tmp_path: Path) -> None:
    """The first start makes it, the next ones read it; nobody else can."""
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
