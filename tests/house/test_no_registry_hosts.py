"""No file says where packages come from, nor where it lay when it was written: both are the reader's own affair."""

import re

import pytest

from tests.house.sources import ROOT, name_of, tracked

# In parts, so that this file does not name what it looks for.
HOSTS = [
    "py" + "pi.org",
    "files.python" + "hosted.org",
    "npm" + "js.org",
    "npm" + "js.com",
    "yarn" + "pkg.com",
    "deb." + "debian.org",
    "archive." + "ubuntu.com",
    "download." + "pytorch.org",
    "conda." + "anaconda.org",
]
FOLDERS = ["wo" + "rk", "op" + "t", "ro" + "ot", "ho" + "me", "Use" + "rs", "mn" + "t"]
PATTERN = re.compile(
    "|".join([*map(re.escape, HOSTS), rf"(?<![\w.~$}}/*-])/(?:{'|'.join(FOLDERS)})/[\w.]"]).encode(),
)

MAY_NAME = {
    "demo/prepare_engine.py": "PyTorch's own index of CPU builds, where the user's index has none",
}


@pytest.mark.parametrize("name", [name for path in tracked() if (name := name_of(path)) not in MAY_NAME])
def test_no_file_names_a_registry_or_a_place_of_one_machine(name: str) -> None:
    assert [found.group() for found in PATTERN.finditer((ROOT / name).read_bytes())] == []


@pytest.mark.parametrize("name", MAY_NAME)
def test_those_that_may_do(name: str) -> None:
    """An exception that nobody needs any more goes."""
    assert PATTERN.search((ROOT / name).read_bytes())


def test_no_lock_with_addresses_is_tracked() -> None:
    names = {name_of(path).rpartition("/")[2] for path in tracked()}
    assert names & {"uv.lock", "pylock.toml", "package-lock.json"} == set()


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (f"https://{HOSTS[0]}/simple", True),
        (f"cp /{FOLDERS[0]}/main/x .", True),
        (f'"/{FOLDERS[2]}/.cache"', True),
        ("/var/lib/xerotier", False),
        (f"docs/{FOLDERS[0]}/x", False),
    ],
)
def test_the_rule_sees_them(text: str, found: bool) -> None:
    assert (PATTERN.search(text.encode()) is not None) == found
