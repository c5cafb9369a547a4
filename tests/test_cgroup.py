"""The memory limit of a container, in trees of files that stand for /proc and /sys/fs/cgroup."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import examples

from mllm import budget, cgroup

MIB = 2**20
LARGEST = 9223372036854771712  # what version 1 says for no limit


class Names(NamedTuple):
    """How the files of a version are called, and the lines by which a process finds them: formats of a path."""

    limit: str
    used: str
    idle: str
    none: str
    group: str
    mount: str


NAMES = {
    2: Names(
        "memory.max",
        "memory.current",
        "inactive_file",
        "max",
        "0::{}",
        "30 23 0:27 {} {} rw - cgroup2 cgroup2 rw",
    ),
    1: Names(
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        "total_inactive_file",
        str(LARGEST),
        "4:cpu,memory:{}",
        "30 23 0:27 {} {} rw shared:9 - cgroup cgroup rw,cpu,memory",
    ),
}


class Tree:
    """A root with the files of one version, for a process in `own`, mounted from `top` on `at`."""

    def __init__(self, root: Path, version: int, own: str, *, top: str = "/", at: str = "/sys/fs/cgroup") -> None:
        self.root, self.names, self.at = root, NAMES[version], root / at.lstrip("/")
        other = "31 23 0:28 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpuset\n25 1 8:1 / / rw - ext4 /dev/sda1 rw\n"
        self.proc("cgroup", f"9:name=systemd:/init.scope\n8:cpuset:/elsewhere\n{self.names.group.format(own)}\n")
        self.proc("mountinfo", other + self.names.mount.format(top, at.replace(" ", "\\040")) + "\n")

    def proc(self, name: str, text: str) -> None:
        path = self.root / "proc/self" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def put(self, group: str, limit: int | str | None, used: int | str | None, idle: int | str | None = 0) -> None:
        """A group's files, in MiB where they are numbers; None leaves one out."""
        folder = self.at / group
        folder.mkdir(parents=True, exist_ok=True)
        idle = f"inactive_anon 7\n{self.names.idle} {idle * MIB}\nother 9\n" if isinstance(idle, int) else idle
        for name, value in ((self.names.limit, limit), (self.names.used, used), ("memory.stat", idle)):
            if value is not None:
                (folder / name).write_text(f"{value * MIB}\n" if isinstance(value, int) else value)

    def left(self) -> float | None:
        """What is available, in MiB."""
        found = cgroup.available(self.root)
        return None if found is None else found / MIB


@pytest.fixture(params=NAMES)
def version(request: pytest.FixtureRequest) -> int:
    return int(request.param)


def test_a_group_leaves_its_limit_less_its_use_and_what_can_be_reclaimed(tmp_path: Path, version: int) -> None:
    tree = Tree(tmp_path, version, "/box")
    tree.put("box", 100, 60, 15)
    assert tree.left() == 100 - (60 - 15)
    tree.put("box", 100, 60, None)
    (tree.at / "box/memory.stat").unlink()
    assert tree.left() == 40
    tree.put("box", 100, 130, 10)  # a limit that was lowered below the use
    assert tree.left() == 0
    tree.put("box", 100, 20, 25)  # the two files are not of the same moment
    assert tree.left() == 100


def test_the_least_that_any_level_leaves_counts_up_to_the_mount(tmp_path: Path, version: int) -> None:
    tree = Tree(tmp_path, version, "/a/b/c")
    for level, limit in (("a/b/c", 90), ("a/b", 80), ("a", 85), (".", 500)):
        tree.put(level, limit, 10)
    assert tree.left() == 70
    tree.put("a", 95, 60, 5)  # taken by a neighbour
    assert tree.left() == 40
    tree.put(".", 12, 10)  # the mount itself: the container's own group, as its namespace shows it
    assert tree.left() == 2
    tree.put("a/other", 1, 1)
    tree.put("..", 1, 1)
    assert tree.left() == 2


def test_no_limit_is_none_at_a_level_and_at_all(tmp_path: Path, version: int) -> None:
    tree = Tree(tmp_path, version, "/a/b")
    for level in ("a/b", "a", "."):
        tree.put(level, tree.names.none, 10)
    assert tree.left() is None
    tree.put("a", 64, 10)
    assert tree.left() == 54


@pytest.mark.parametrize("text", [LARGEST, 2**63 - 65536, 2**63 - 1, 2**64 - 1, 2**60])
def test_absurdly_many_bytes_are_no_limit(tmp_path: Path, text: int) -> None:
    """Version 1 has no word for it, and pages of 64 KiB make it another number."""
    tree = Tree(tmp_path, 1, "/")
    tree.put(".", f"{text}\n", 10)
    assert tree.left() is None


def test_a_container_without_a_namespace_finds_its_group_where_it_is_mounted(tmp_path: Path, version: int) -> None:
    """Its path is the host's, of which the mount shows the end."""
    tree = Tree(tmp_path, version, "/docker/12ab/job", top="/docker/12ab")
    tree.put("job", 50, 20)
    tree.put("docker/12ab/job", 1, 1)
    assert tree.left() == 30
    tree.put(".", 25, 20)
    assert tree.left() == 5


@pytest.mark.parametrize(("own", "top"), [("/else/where", "/docker/12ab"), ("/../../other", "/"), ("/..", "/..")])
def test_a_group_that_cannot_be_seen_from_the_mount_leaves_what_the_mount_says(
    tmp_path: Path, version: int, own: str, top: str
) -> None:
    tree = Tree(tmp_path, version, own, top=top)
    tree.put(".", 50, 20)
    for elsewhere in ("..", "../..", "../../other"):
        tree.put(elsewhere, 1, 1)
    assert tree.left() == 30


def test_a_mount_may_be_anywhere_and_have_a_space(tmp_path: Path, version: int) -> None:
    tree = Tree(tmp_path, version, "/box", at="/mnt/control groups")
    tree.put("box", 50, 20)
    assert tree.left() == 30


def test_both_versions_may_be_mounted_and_only_one_counts_memory(tmp_path: Path) -> None:
    """As systemd's hybrid layout: version 2 has the processes, version 1 the memory."""
    tree = Tree(tmp_path, 1, "/box", at="/sys/fs/cgroup/memory")
    more = {"cgroup": "0::/box\n", "mountinfo": "41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n"}
    for name, line in more.items():
        tree.proc(name, (tmp_path / "proc/self" / name).read_text() + line)
    (tmp_path / "sys/fs/cgroup/unified/box").mkdir(parents=True)
    tree.put("box", 50, 20)
    assert tree.left() == 30


BROKEN = ["", "\n", "-1", "12 34", "ten", "1e9", "9" * 5000, "\0", "0x10", "max max", "\N{SUPERSCRIPT TWO}"]


@pytest.mark.parametrize("text", BROKEN)
def test_a_file_that_holds_no_number_says_nothing(tmp_path: Path, version: int, text: str) -> None:
    tree = Tree(tmp_path, version, "/a/b")
    tree.put("a", 64, 10)
    tree.put("a/b", text, 10)
    assert tree.left() == 54
    tree.put("a/b", 32, text)
    assert tree.left() == 54
    tree.put("a/b", 32, 10, f"{tree.names.idle} {text}")
    assert tree.left() == 22


def test_files_that_are_missing_or_cannot_be_read_say_nothing(tmp_path: Path, version: int) -> None:
    assert cgroup.available(tmp_path) is None
    tree = Tree(tmp_path, version, "/a/b")
    assert tree.left() is None
    tree.put("a", 64, 10)
    tree.put("a/b", 32, None)
    assert tree.left() == 54
    (tree.at / "a" / tree.names.used).unlink()
    (tree.at / "a" / tree.names.used).mkdir()  # whoever reads it gets an error, root as well
    assert tree.left() is None
    for name in ("cgroup", "mountinfo"):
        (tmp_path / "proc/self" / name).unlink()
        (tmp_path / "proc/self" / name).mkdir()
        assert tree.left() is None


def test_groups_of_other_hierarchies_do_not_count(tmp_path: Path, version: int) -> None:
    tree = Tree(tmp_path, version, "/box", at="/sys/fs/cgroup/memory")
    tree.put("box", 50, 20)
    for elsewhere in ("elsewhere", "init.scope", "../cpu/box", "../cpu/elsewhere", "../cpu"):
        tree.put(elsewhere, 1, 1)
    assert tree.left() == 30


@pytest.mark.parametrize("line", ["0::/b\0x", "0:/box", "4:memory", "0::box", "memory", "::", ":::"])
def test_a_group_that_is_malformed_says_nothing_and_hides_no_other(tmp_path: Path, version: int, line: str) -> None:
    tree = Tree(tmp_path, version, "/box")
    tree.put("box", 50, 20)
    tree.proc("cgroup", f"{line}\n{tree.names.group.format('/box')}\n")
    assert tree.left() == 30


@pytest.mark.parametrize(
    "line", ["", " - ", "30 23 0:27 / relative rw - {}", "30 - {}", "30 23 0:27 / /m\\000 rw - {}"]
)
def test_a_mount_that_is_malformed_says_nothing_and_hides_no_other(tmp_path: Path, version: int, line: str) -> None:
    tree = Tree(tmp_path, version, "/box")
    tree.put("box", 50, 20)
    good = tree.names.mount.format("/", "/sys/fs/cgroup")
    tree.proc("mountinfo", f"{line.format(good.partition(' - ')[2])}\n{good}\n")
    assert tree.left() == 30


LINES = st.one_of(
    st.text(max_size=40),
    st.lists(st.sampled_from(["30", "/", "/a", "/../a", "-", " - ", "cgroup2", "cgroup", "memory", "rw,memory", "0::/a",
                              "4:memory:/a", "4:memory:a", "0::", "\\040", "\\777", "\0"]), max_size=12).map(" ".join),
)  # fmt: skip


@examples(200)
@given(groups=st.lists(LINES, max_size=4), mounts=st.lists(LINES, max_size=4))
def test_whatever_the_files_of_the_process_hold_nothing_is_raised(groups: list[str], mounts: list[str]) -> None:
    for interface in cgroup.INTERFACES:
        found = cgroup.folders("\n".join(groups), "\n".join(mounts), interface)
        assert all(folder.is_absolute() for folder in found)
        for folder in found:
            assert cgroup._left(Path("/nowhere") / folder.relative_to("/"), interface) is None


def test_here_it_is_what_the_system_has_or_less() -> None:
    """On the machine that runs this, whatever it is."""
    size, source = budget._system()
    assert 0 < size <= psutil.virtual_memory().total
    assert source in ("system", "cgroup")
