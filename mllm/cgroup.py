"""What the control groups of a process leave it of the system's memory: the limit of a container, on Linux.

    left = limit - (used - what the kernel would give back first)        at every level up to the mount; the least counts

psutil tells the machine's memory, in a container too, and who takes more than its group may is killed. No package that
mllm needs knows better, so the few files are read here: each time, since a limit can change while a process runs.
"""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import NamedTuple


class Interface(NamedTuple):
    """One of the kernel's two interfaces: its file system, and its names for limit, use, and idle pages of files.

    `controller`: what counts memory there, by /proc/self/cgroup and the mount's options; the second has one hierarchy.
    """

    file_system: str
    controller: str
    limit: str
    used: str
    idle: str


INTERFACES = (
    Interface("cgroup2", "", "memory.max", "memory.current", "inactive_file"),
    Interface("cgroup", "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
NO_LIMIT = 2**60
"""Bytes from which on a limit is none: version 1 says so with the largest number of pages that it can count."""


def available(root: Path = Path("/")) -> int | None:
    """Bytes that the control groups of this process leave it; None where none of them has a limit that can be read.

    Whatever is missing or malformed counts as not there: it raises nothing. `root` is where /proc and /sys are.
    """
    groups, mounts = _text(root / "proc/self/cgroup"), _text(root / "proc/self/mountinfo")
    left = [
        _left(root / folder.relative_to("/"), interface)
        for interface in INTERFACES
        for folder in folders(groups, mounts, interface)
    ]
    return min((count for count in left if count is not None), default=None)


@lru_cache(maxsize=8)
def folders(groups: str, mounts: str, interface: Interface) -> tuple[PurePosixPath, ...]:
    """The folders of the groups that hold a process, by its /proc/self/cgroup and /proc/self/mountinfo: from its own
    up to where they are mounted. Only the last where the process's own cannot be seen from there."""
    lines = [line.split(":", 2) for line in groups.splitlines() if line.count(":") >= 2]
    own = [PurePosixPath(path) for _, names, path in lines if interface.controller in names.split(",")]
    found: list[PurePosixPath] = []
    for line in mounts.splitlines():
        before, _, after = line.partition(" - ")  # a number of optional fields ends there
        fields, (kind, _, options) = before.split(), (*after.split(), "", "", "")[:3]
        if kind != interface.file_system or interface.controller not in ("", *options.split(",")):
            continue
        if len(fields) < 5 or not fields[4].startswith("/"):
            continue
        mounted, top = _unescaped(fields[3]), PurePosixPath(_unescaped(fields[4]))
        for path in own:
            inside = path.relative_to(mounted) if path.is_relative_to(mounted) else PurePosixPath()
            if ".." in inside.parts:  # a group outside the namespace of this process
                inside = PurePosixPath()
            found += [top / part for part in (inside, *inside.parents)]
    return tuple(dict.fromkeys(found))


def _left(folder: Path, interface: Interface) -> int | None:
    """Bytes that the group of a folder leaves; None without a limit, or where it or the use cannot be read."""
    limit = _number(_text(folder / interface.limit))
    if limit is None or limit >= NO_LIMIT or (used := _number(_text(folder / interface.used))) is None:
        return None
    idle = re.search(rf"^{interface.idle} (\d+)$", _text(folder / "memory.stat"), re.MULTILINE)
    held = used - (_number(idle[1]) or 0 if idle else 0)
    return max(limit - max(held, 0), 0)


def _number(text: str) -> int | None:
    """The bytes that a file says; None for "max", and for what is no number of them."""
    return int(text) if re.fullmatch(r"\s*\d{1,20}\s*", text) else None


def _text(path: Path) -> str:
    """The contents of a file; nothing for one that cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except (OSError, ValueError):  # also for a path that no file can have
        return ""


def _unescaped(path: str) -> str:
    """A path as it is, in which mountinfo writes spaces and the like as octal numbers."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), path)
