"""What people write for a place in a bucket."""

from __future__ import annotations

import re
from dataclasses import dataclass

from batchrunner.errors import UsageError

# Source: the rules for bucket names of Amazon S3; a prefix is whatever may follow, without empty parts.
_ADDRESS = re.compile(r"s3://(?P<bucket>[A-Za-z0-9][A-Za-z0-9._-]{1,62})(?P<key>(?:/[^/\x00-\x1f]+)*)/?")


@dataclass(frozen=True, slots=True)
class S3Address:
    """A place in a bucket: a key, or the prefix of many, without slashes at its ends."""

    bucket: str
    key: str

    def __str__(self) -> str:
        return f"s3://{self.bucket}/{self.key}"

    def below(self, part: str) -> S3Address:
        """Give the address of what lies in this one as in a folder."""
        return S3Address(self.bucket, f"{self.key}/{part}" if self.key else part)

    def beside(self, name: str) -> S3Address:
        """Give the address of what lies beside this one under another name."""
        folder, slash, _ = self.key.rpartition("/")
        return S3Address(self.bucket, f"{folder}{slash}{name}")


def is_s3(text: str) -> bool:
    """Tell whether somebody meant an S3 address."""
    return text.startswith("s3:")


def parse_address(text: str) -> S3Address:
    """Read `s3://BUCKET/KEY`.

    Raises:
        UsageError: it is no such address.
    """
    match = _ADDRESS.fullmatch(text)
    if match is None:
        raise UsageError(f"{text!r} is no address of the kind s3://BUCKET/PREFIX")
    return S3Address(match["bucket"], match["key"].removeprefix("/"))
