"""Folders of programs, where they are on a disk: what they take, and how they go away whatever is in them."""

from __future__ import annotations

import contextlib
import os

#: No folder of a program has more entries.
MOST_ENTRIES = 4096


def size(folder: str, most: int) -> int:
    """Bytes on disk of what is in a folder; stops counting beyond `most`, or where there are too many entries."""
    total, entries, waiting = 0, 0, [folder]
    while waiting and total <= most:
        try:
            with os.scandir(waiting.pop()) as found:
                for entry in found:
                    status = entry.stat(follow_symlinks=False)
                    total += status.st_blocks * 512
                    entries += 1
                    if entries > MOST_ENTRIES:
                        return most + 1
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(entry.path)
        except OSError:  # gone meanwhile, or deeper than a path can be
            continue
    return total


def remove(folder: str) -> None:
    """Remove a folder, as far as permissions go; depth and links in it do no harm.

    Folders in it are moved to its top before they are emptied, so that nothing is ever deep.
    """
    try:
        top = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return
    try:
        waiting, count = os.listdir(top), 0
        while waiting:
            name = waiting.pop()
            if _unlink(name, top):
                continue
            try:
                inside = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=top)
            except OSError:
                continue
            try:
                for entry in os.listdir(inside):
                    if not _unlink(entry, inside):
                        count += 1
                        moved = f"\n{count}"
                        os.rename(entry, moved, src_dir_fd=inside, dst_dir_fd=top)
                        waiting.append(moved)
                os.rmdir(name, dir_fd=top)
            except OSError:
                continue
            finally:
                os.close(inside)
    finally:
        os.close(top)
    with contextlib.suppress(OSError):
        os.rmdir(folder)


def _unlink(name: str, folder: int) -> bool:
    """Remove an entry that is no folder or an empty one; else make the folder accessible."""
    for act in (os.unlink, os.rmdir):
        try:
            act(name, dir_fd=folder)
            return True
        except OSError:
            continue
    with contextlib.suppress(OSError):
        os.chmod(name, 0o700, dir_fd=folder)
    return False
