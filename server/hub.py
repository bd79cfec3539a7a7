"""Data sets by their name on the hub: read in a child process, so that the API never imports the library.

The parent calls `fetch`; the child is `python -m server.hub`. Code from the hub is never run, and the
operator's own hub token is never sent: a tenant sees what is public.
"""

import json
import os
import re
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from server import children
from server.errors import MixloomError
from server.strict_json import plain

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
SPLIT = re.compile(r"(?P<whole>[A-Za-z0-9_][A-Za-z0-9._-]{0,95})(\[:(?P<first>[0-9]{1,9})\])?")
FETCH_SECONDS = 600
ASK_SECONDS = 10.0
_TOO_LARGE = 3  # exit status of the child


@dataclass(frozen=True)
class HubSplit:
    """A split of a data set on the hub, or its first rows (`train[:1000]`). `revision` None: the newest."""

    name: str
    config: str | None
    split: str
    revision: str | None


def fetch(wanted: HubSplit, target: Path, max_bytes: int) -> str:
    """Write the rows of a split to `target`, one JSON object a line. Returns the commit that they are of.

    Raises MixloomError `invalid_hub_name`, `invalid_split`, `hub_unavailable`, `dataset_too_large`.
    """
    if not NAME.fullmatch(wanted.name) or ".." in wanted.name:
        message = f"A hub data set is named 'org/name'; this is '{wanted.name}'. Look its name up on the hub."
        raise MixloomError("invalid_hub_name", message, param="hub")
    if not SPLIT.fullmatch(wanted.split):
        message = f"A split is written 'train' or 'train[:1000]'; this is '{wanted.split}'."
        raise MixloomError("invalid_split", message, param="split")
    try:
        child = subprocess.run(
            children.command("server.hub", str(target.absolute()), json.dumps(asdict(wanted)), str(max_bytes)),
            env=children.environment(),
            capture_output=True,
            text=True,
            timeout=FETCH_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise _unavailable(wanted, f"it took longer than {FETCH_SECONDS} seconds") from None
    if child.returncode == _TOO_LARGE:
        raise MixloomError(
            "dataset_too_large",
            f"'{wanted.split}' of '{wanted.name}' has more than {max_bytes >> 20} MiB of rows. Ask for its "
            "first rows ('train[:1000]'), or upload a part of it as a file.",
            413,
            "hub",
        )
    if child.returncode:
        raise _unavailable(wanted, (child.stderr.strip().splitlines() or ["it ended without a word"])[-1])
    return child.stdout.strip()


def _unavailable(wanted: HubSplit, reason: str) -> MixloomError:
    return MixloomError(
        "hub_unavailable",
        f"The hub data set '{wanted.name}' could not be read: {reason}. Check its name, config, split and "
        "revision and the server's way to the hub, or upload the rows as a file.",
        param="hub",
    )


def commit_of(wanted: HubSplit) -> str:
    """The commit that a revision stands for. Asks the hub once, and fails soon when it is out of reach."""
    from huggingface_hub import HfApi

    info = HfApi(token=False).dataset_info(wanted.name, revision=wanted.revision, timeout=ASK_SECONDS)
    return str(info.sha)


def write_rows(wanted: HubSplit, target: Path, max_bytes: int) -> bool:
    """Stream a split to `target` as JSON Lines; False when it is larger than `max_bytes`."""
    import datasets

    split = SPLIT.fullmatch(wanted.split)
    assert split is not None, "fetch() has looked at it"
    rows = datasets.load_dataset(
        wanted.name,
        wanted.config,
        split=split["whole"],
        revision=wanted.revision,
        streaming=True,
        token=False,
    )
    if split["first"] is not None:
        rows = rows.take(int(split["first"]))
    written = 0
    with target.open("w", encoding="utf-8") as file:
        for row in rows:
            line = json.dumps(plain(row), ensure_ascii=False) + "\n"
            written += len(line.encode())
            if written > max_bytes:
                return False
            file.write(line)
    return True


def main(target: Path, wanted: HubSplit, max_bytes: int) -> None:
    """The child: prints the commit that it read. Ends with 1 and a sentence on stderr, or with _TOO_LARGE."""
    os.chdir(target.parent)  # a folder `org/name` in the working directory would be taken for the data set
    try:
        commit = commit_of(wanted)
        if not write_rows(HubSplit(wanted.name, wanted.config, wanted.split, commit), target, max_bytes):
            sys.exit(_TOO_LARGE)
    except Exception as error:  # whatever the hub's libraries raise is one sentence to the parent
        sys.exit(f"{type(error).__name__}: {' '.join(str(error).split())}")
    print(commit)


if __name__ == "__main__":
    main(Path(sys.argv[1]), HubSplit(**json.loads(sys.argv[2])), int(sys.argv[3]))
