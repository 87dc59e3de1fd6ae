"""Write the pre-training corpus of pocket: train.jsonl, valid.jsonl and the general text bundled with the package.

    python scripts/pocket/corpus.py --out runs/pocket-corpus

Every document is new, made by rules from one seed; nothing is taken from elsewhere. Documents with certain combinations
(who and where, for instance) are kept out of the training part and make up the held-out parts alone.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

from records import Records
from sums import sums
from wordlists import Wordlists
from world import World, pick

from tunesmith.core.files import write_jsonl
from tunesmith.core.seed import seed_of
from tunesmith.pocket import general_text, replay_text, tickets
from tunesmith.pocket.grammar import Grammar

_HERE = Path(__file__).parent
_PRONOUNS = (("girl", "she", "her", "her"), ("boy", "he", "his", "him"))

# Shares of documents, not of tokens: stories are long, sums are short.
SHARES = {
    "story": 20, "report": 16, "description": 11, "list_doc": 6, "howto": 8, "email": 8, "talk": 7, "question_turns": 3,
    "corpus.ticket": 12, "log": 70, "fact": 16, "record": 10, "sums": 8, "wordlist": 7,
}  # fmt: skip


class Writer:
    """Documents of every kind, and the combination by which one belongs to the training or the held-out part."""

    def __init__(self) -> None:
        self.grammar = Grammar.read(tickets.RULES, *sorted((_HERE / "grammar").glob("*.txt")))
        self.world = World(self.grammar)
        self.kinds = [kind for kind, share in SHARES.items() for _ in range(share)]
        self.others: dict[str, Callable[[Random], str]] = {
            "fact": self.world.fact,
            "record": Records(self.world).record,
            "sums": sums,
            "wordlist": Wordlists(self.grammar).wordlist,
            "log": self._log,
        }

    def document(self, kind: str, random: Random) -> tuple[str, str]:
        """The text of one document and its combination."""
        if kind in self.others:
            text = self.others[kind](random)
            return text, text
        bound = self._people(random)
        text = self.grammar.write(kind, random, bound)
        if kind in ("story", "description"):
            spot = bound.get("spot", "") + bound.get("it_is", "")
            return text, f"{bound['hero']} {bound['friend']} {spot}"
        return text, text

    def _log(self, random: Random) -> str:
        """A ticket and where it went: what a later word says of an earlier sentence, which a small model sees nowhere else."""
        desk, level = pick(random, tickets.CATEGORIES), pick(random, tickets.URGENCIES)
        bound = {"desk": desk, "level": level}
        bound["problem"] = self.grammar.write(f"l.{desk}", random)
        bound["press"] = self.grammar.write(f"l.{level}", random)
        bound["ticket"] = self.grammar.write("log_ticket", random, bound)
        return self.grammar.write("log", random, bound)

    def _people(self, random: Random) -> dict[str, str]:
        rule, he, his, him = pick(random, _PRONOUNS)
        hero = friend = self.grammar.write(rule, random)
        while friend == hero:
            friend = self.grammar.write("name", random)
        return {"hero": hero, "he": he, "his": his, "him": him, "friend": friend}

    def documents(self, seed: int, part: str) -> Iterator[str]:
        """Documents without end, no two alike; `part` is "train" or the name of a held-out part."""
        random = Random(seed_of(seed, "pocket corpus", part))
        seen: set[bytes] = set()
        while True:
            text, combination = self.document(pick(random, self.kinds), random)
            held_out = zlib.crc32(combination.encode()) % 20
            digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
            if (held_out == 0) == (part == "train") or digest in seen:
                continue
            seen.add(digest)
            yield text

    def pages(self, seed: int, part: str) -> Iterator[str]:
        """The documents, some of them joined to longer pages, so that late positions are trained too."""
        documents, random = self.documents(seed, part), Random(seed_of(seed, "pocket pages", part))
        for first in documents:
            more = 1 + int(random.random() * 6) if random.random() < 0.06 else 0
            yield "\n\n".join([first, *(next(documents) for _ in range(more))])


def take(documents: Iterator[str], characters: int) -> list[dict[str, str]]:
    """The first documents that together have at least `characters` characters, as rows."""
    rows: list[dict[str, str]] = []
    while characters > 0:
        rows.append({"text": next(documents)})
        characters -= len(rows[-1]["text"])
    return rows


def bundled(documents: Iterator[str], count: int, size: int) -> list[dict[str, str]]:
    """`count` documents without chat marks, at most `size` bytes as a file."""
    rows: list[dict[str, str]] = []
    while len(rows) < count:
        text = next(documents)
        if "<|" not in text:
            rows.append({"text": text})
    written = sum(len(json.dumps(row)) + 1 for row in rows)
    if written > size:
        raise SystemExit(f"the general text has {written} bytes, more than {size}: take fewer documents")
    return rows


def main() -> None:
    """Write the files and say how large they are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/pocket-corpus"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--megabytes", type=float, default=42.0, help="size of the training text")
    parser.add_argument("--bundle", action="store_true", help="also write the general texts of the package")
    options = parser.parse_args()
    writer, begin = Writer(), time.perf_counter()
    parts = {"train": take(writer.pages(options.seed, "train"), int(options.megabytes * 1e6))}
    parts["valid"] = take(writer.pages(options.seed, "valid"), 120_000)
    for part, rows in parts.items():
        write_jsonl(options.out / f"{part}.jsonl", rows)
        print(f"{part}: {len(rows)} documents, {sum(len(row['text'].encode()) for row in rows)} bytes of text")
    if options.bundle:
        write_jsonl(general_text(), bundled(writer.documents(options.seed, "general"), 300, 150_000))
        write_jsonl(replay_text(), bundled(writer.documents(options.seed, "replay"), 300, 150_000))
    print(f"{time.perf_counter() - begin:.1f} s")


if __name__ == "__main__":
    main()
