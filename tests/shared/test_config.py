from pathlib import Path

import pytest
from pydantic import Field

from shared.config import InvalidSettings, Settings, load, read_secret


class Example(Settings):
    name: str
    port: int = Field(8000, ge=0, le=65535)
    ratio: float = 0.5


def test_flag_beats_environment_beats_file(tmp_path: Path) -> None:
    """Each layer overrides only what it names; a flag of None is not given."""
    file = tmp_path / "e.toml"
    file.write_text('name = "file"\nport = 1\nratio = 0.1\n')
    env = {"CAUSEWAY_PORT": "2", "CAUSEWAY_RATIO": "0.2", "OTHER": "x", "CAUSEWAY_UNRELATED": "x"}

    assert load(Example, file, env, {"ratio": 0.3, "port": None}) == Example(name="file", port=2, ratio=0.3)


@pytest.mark.parametrize(
    ("text", "env", "flags", "where", "field"),
    [
        ("port = 1", {}, {}, "settings", "name"),
        ('name = "a"\nport = 70000', {}, {}, "e.toml", "port"),
        ('name = "a"\nzap = 1', {}, {}, "e.toml", "zap"),
        ('name = "a"', {"CAUSEWAY_PORT": "many"}, {}, "environment", "port"),
        ('name = "a"', {}, {"port": -1}, "command line", "port"),
    ],
)
def test_a_bad_setting_is_named_with_its_source(
    tmp_path: Path, text: str, env: dict[str, str], flags: dict[str, object], where: str, field: str
) -> None:
    """The message says which field is wrong and where it was written."""
    file = tmp_path / "e.toml"
    file.write_text(text)
    with pytest.raises(InvalidSettings) as refused:
        load(Example, file, env, flags)
    assert refused.value.param == field
    assert where in str(refused.value)
    assert field in str(refused.value)


@pytest.mark.parametrize("content", [b"name = ", b"\xff", None])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, content: bytes | None) -> None:
    """Broken TOML, not UTF-8, or not there."""
    file = tmp_path / "e.toml"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(InvalidSettings, match=r"e\.toml"):
        load(Example, file, {}, {})


def test_settings_are_frozen() -> None:
    """Nobody changes settings at run time."""
    settings = load(Example, None, {}, {"name": "a"})
    with pytest.raises(ValueError, match="frozen"):
        settings.port = 1  # type: ignore[misc]


def secret_file(folder: Path, content: bytes, mode: int = 0o600) -> Path:
    path = folder / "edge.key"
    path.write_bytes(content)
    path.chmod(mode)
    return path


@pytest.mark.parametrize("content", [b"cw_1_abc", b"cw_1_abc\n", b"  cw_1_abc \r\n"])
def test_secret_is_the_files_one_line(tmp_path: Path, content: bytes) -> None:
    """Surrounding white space is no part of it."""
    assert read_secret(secret_file(tmp_path, content), "key_file") == "cw_1_abc"


@pytest.mark.parametrize("content", [b"", b" \n", b"two words", b"two\nlines", b"\xff\xfe", b"a\x00b", b"x" * 5000])
def test_what_is_no_secret_is_refused_unquoted(tmp_path: Path, content: bytes) -> None:
    """The error names setting and file, and quotes nothing of the content."""
    with pytest.raises(InvalidSettings) as error:
        read_secret(secret_file(tmp_path, content), "key_file")

    assert error.value.param == "key_file"
    assert "two" not in str(error.value)


def test_a_secret_that_everybody_can_read_is_refused(tmp_path: Path) -> None:
    """And the error says what to do."""
    with pytest.raises(InvalidSettings, match="chmod 600"):
        read_secret(secret_file(tmp_path, b"cw", 0o644), "key_file")


def test_a_missing_secret_is_named(tmp_path: Path) -> None:
    """File and reason."""
    with pytest.raises(InvalidSettings, match=r"gone.*No such file"):
        read_secret(tmp_path / "gone", "key_file")
