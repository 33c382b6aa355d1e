"""Every knob and limit with its unit in its name, its default and one line of meaning; where a value comes from is kept
beside it.

This module reads no file and no environment: the caller hands in the layers, strongest first.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import TypeVar, get_args, get_type_hints

import msgspec

from batchrunner.errors import UsageError
from batchrunner.prices import parse_price
from batchrunner.targets import Target, read_targets

KIB, MIB, GIB = 1024, 1024**2, 1024**3

_T = TypeVar("_T")

ENDPOINTS = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/embeddings",
    "/v1/moderations",
    "/v1/images/generations",
    "/v1/images/edits",
    "/v1/videos",
    "/v1/videos/generations",
    "/v1/videos/edits",
    "/v1/videos/extensions",
    "/v1/music/generations",
    "/v1/audio/speech",
    "/v1/rerank",
    "/v1/score",
    "/v1/messages",
)

AUTO = "auto"

_DURATION = re.compile(r"(\d{1,15}(?:\.\d{1,15})?)(ms|s|m|h|d)?", re.ASCII)
_SECONDS = {None: 1.0, "ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_SIZE = re.compile(r"(\d{1,15}(?:\.\d{1,15})?)\s*(b|kib|mib|gib|kb|mb|gb)?", re.IGNORECASE | re.ASCII)
_BYTES = {None: 1, "b": 1, "kib": KIB, "mib": MIB, "gib": GIB, "kb": 1000, "mb": 1000**2, "gb": 1000**3}


def _knob(default: _T, meaning: str) -> _T:
    """A dataclass field with the sentence that `config show` and the reference print."""
    return field(default=default, metadata={"meaning": meaning})


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """All settings of one process. Names are those of `batchrunner.toml`; the environment has them as
    BATCHRUNNER_NAME.
    """

    base_url: str | None = _knob(
        None, "what the SDKs call base_url: the upstream's address, such as http://localhost:8000/v1"
    )
    api_key_env: str = _knob("OPENAI_API_KEY", "name of the environment variable that holds the upstream's key")
    upstream: tuple[Target, ...] = _knob(
        (), "several upstreams, as `[[upstream]]` tables of batchrunner.toml; see docs/operations.md, Several upstreams"
    )
    endpoints: tuple[str, ...] = _knob(ENDPOINTS, "the urls that a line may name")
    concurrency: int | None = _knob(None, "requests in flight for all workers together; unset finds it by itself")
    window_max: int = _knob(4096, "the most requests in flight that the self-found window may reach")
    workers: int | None = _knob(None, "worker processes; unset means one per core, in `run` one up to 10,000 lines")
    rpm: int | None = _knob(None, "requests a minute for all workers together; unset means no limit")
    tpm: int | None = _knob(None, "tokens a minute for all workers together; unset means no limit")
    max_tries: int = _knob(5, "tries of one line that ended in an error of its own, the first included")
    request_timeout_s: float = _knob(600.0, "total time of one exchange with the upstream")
    idle_timeout_s: float = _knob(300.0, "longest silence in the middle of one exchange")
    connect_timeout_s: float = _knob(10.0, "time to open a connection")
    first_contact_s: float = _knob(10.0, "how long an upstream that never answered may be unreachable")
    retry_after_max_s: float = _knob(600.0, "longest wait that an upstream may ask for")
    reply_bytes_max: int = _knob(32 * MIB, "largest decoded answer")
    asset_bytes_max: int = _knob(512 * MIB, "largest answer with audio, image, video or binary content")
    memory_bytes_max: int = _knob(
        256 * MIB, "budget of one worker process for shards, bodies, answers and unsynced records"
    )
    lease_s: float = _knob(15.0, "how long a worker owns a task without a sign of life")
    renew_s: float = _knob(5.0, "interval of these signs")
    poll_s: float = _knob(0.5, "interval at which a worker asks for cancel, pause and limits")
    sweep_s: float = _knob(30.0, "interval of the sweep that repairs what a crash missed")
    register_s: float = _knob(1.0, "longest time until a durable result is readable")
    journal_tick_s: float = _knob(0.05, "longest time until a finished line is durable")
    cancel_grace_s: float = _knob(30.0, "how long requests in flight may go on after a cancel or deadline")
    drain_grace_s: float = _knob(30.0, "how long requests in flight may go on after the first Ctrl-C or SIGTERM")
    lines_max: int = _knob(10_000_000, "most lines of one input")
    input_bytes_max: int = _knob(8 * GIB, "largest input")
    line_bytes_max: int = _knob(16 * MIB, "longest input line")
    custom_id_chars_max: int = _knob(512, "longest custom_id")
    problems_max: int = _knob(1000, "most problems that a batch lists; the report has all")
    shard_lines_max: int = _knob(1000, "most lines of one shard")
    shard_bytes_max: int = _knob(8 * MIB, "largest shard")
    assets_url: str = _knob("assets", "what stands before the name of a media answer in its url; run sets it by OUTPUT")
    output_retention_s: float | None = _knob(
        30 * 86400.0, "how long a server keeps the files of an ended batch that asks for nothing else; none is for ever"
    )
    open_idle_s: float = _knob(
        6 * 3600.0, "how long an open batch that has nothing to do waits for more requests before it ends"
    )
    job_retention_s: float = _knob(
        14 * 86_400.0, "how long a job and its result are kept; one that is not done by then has failed"
    )
    prices: tuple[str, ...] = _knob(
        (), "what tokens cost, as MODEL=INPUT/OUTPUT or MODEL=INPUT/CACHED/OUTPUT in US dollars a million; `*` in MODEL"
    )
    file_bytes_max: int = _knob(8 * GIB, "largest file or upload that a server takes")
    batch_file_expires_s: float | None = _knob(
        30 * 86400.0, "how long an uploaded batch file lives that does not say so itself; none is for ever"
    )
    upload_part_bytes_max: int = _knob(64 * MIB, "largest part of an upload")
    upload_expires_s: float = _knob(3600.0, "how long an upload may take from its creation to its completion")
    dialects: str = _knob(
        AUTO, "what a server speaks at /v1: auto takes every dialect that it knows, openai is OpenAI's API and no more"
    )
    async_enabled: bool = _knob(True, "whether a server takes inference.club's async jobs and batches")
    host: str = _knob("127.0.0.1", "address that a server listens on; any but loopback needs API keys")
    port: int = _knob(8080, "port that a server listens on; 0 takes a free one")
    server_folder: str | None = _knob(
        None, "where a server keeps its state; unset means $XDG_DATA_HOME/batchrunner, else ~/.local/share/batchrunner"
    )
    api_threads: int = _knob(16, "threads of a server's API for whatever blocks: database, files, validation")
    webhook_url: str | None = _knob(
        None, "who is told the end of a run, and of batches that name no webhook_url themselves"
    )
    webhook_networks: tuple[str, ...] = _knob(
        (), "address ranges beside public ones where webhooks may go, http included, such as 10.0.0.0/8"
    )
    webhook_concurrency: int = _knob(32, "notifications under way to one receiver at a time")
    reserve_bytes: int = _knob(4 * MIB, "space held back so that statuses can be written on a full disk")
    blobs: str | None = _knob(
        None, "where files, journals and results are kept: s3://BUCKET/PREFIX; unset means the data folder"
    )
    s3_endpoint_url: str | None = _knob(None, "address of the S3 service; unset means what boto3 finds, else AWS")
    s3_region: str | None = _knob(None, "region of the bucket; unset means what boto3 finds")
    s3_addressing: str = _knob("auto", "how a bucket is named in an address: path, virtual, or auto")
    s3_ca_bundle: str | None = _knob(None, "file with the certificates to trust; unset means what boto3 finds")
    s3_sse: str | None = _knob(None, "encryption asked of the service: AES256, aws:kms or aws:kms:dsse")
    s3_sse_kms_key_id: str | None = _knob(None, "the key that aws:kms encrypts with; unset means the bucket's")
    s3_threads: int = _knob(8, "requests that one process has under way at the S3 service")
    s3_timeout_s: float = _knob(30.0, "longest silence of the S3 service within a request")
    s3_part_bytes: int = _knob(8 * MIB, "part of a multipart upload, 8 to 16 MiB; each upload holds three")
    segment_s: float = _knob(2.0, "longest time until a finished line is durable on S3")
    segment_bytes: int = _knob(MIB, "journal bytes of one shard that are written to S3 at once, without waiting")


def targets_of(settings: Settings) -> tuple[Target, ...]:
    """Give the upstreams: those of the tables, or the one that `base_url` names; none is named where both are unset.

    A table that says nothing of window, rpm or tpm has those of the settings.
    """
    if not settings.upstream:
        targets: tuple[Target, ...] = (
            Target(name="default", base_url=settings.base_url or "", api_key_env=settings.api_key_env),
        )
    else:
        targets = settings.upstream
    return tuple(
        msgspec.structs.replace(
            target,
            window=target.window or settings.concurrency,
            rpm=target.rpm or settings.rpm,
            tpm=target.tpm or settings.tpm,
        )
        for target in targets
    )


def has_upstream(settings: Settings) -> bool:
    """Tell whether any upstream is named."""
    return bool(settings.upstream or settings.base_url)


def parse_duration(text: str, *, what: str) -> float:
    """Read a duration such as `24h`, `200ms` or `90` (seconds), in seconds.

    Raises:
        UsageError: the text is no duration; the message names `what`.
    """
    match = _DURATION.fullmatch(text.strip())
    if match is None:
        raise UsageError(f"{what}: {text!r} is no duration; write a number with ms, s, m, h or d, such as 90s or 24h")
    return float(match[1]) * _SECONDS[match[2]]


def parse_window(text: str, *, what: str) -> float:
    """Read how long a batch may take, from a minute to two weeks, in seconds.

    Raises:
        UsageError: it is no such duration; the message names `what`.
    """
    seconds = parse_duration(text, what=what)
    if not 60.0 <= seconds <= 14 * 86400.0:
        raise UsageError(f"{what} {text}: from 1m to 14d")
    return seconds


def parse_size(text: str, *, what: str) -> int:
    """Read a size such as `16MiB`, in bytes.

    Raises:
        UsageError: the text is no size; the message names `what`.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise UsageError(f"{what}: {text!r} is no size; write a number with B, KiB, MiB or GiB, such as 16MiB")
    return int(float(match[1]) * _BYTES[match[2].lower() if match[2] else None])


_EXCLUDED = {"base_url": ("upstream",), "upstream": ("base_url",)}


def resolve(layers: Sequence[tuple[str, Mapping[str, object]]]) -> tuple[Settings, dict[str, str]]:
    """Lay the layers (origin, values by setting name; strongest first) over the defaults.

    Gives the settings and, by name, the origin of each value. Values of None count as not given; text is parsed by the
    unit in the setting's name.

    Raises:
        UsageError: an unknown name, or a value that does not fit; the message names the origin.
    """
    known = {knob.name for knob in fields(Settings)}
    values: dict[str, object] = {}
    origins = dict.fromkeys(known, "default")
    for origin, layer in reversed(layers):
        if layer.get("base_url") is not None and layer.get("upstream") is not None:
            raise UsageError(f"{origin}: base_url and [[upstream]] both say where lines go", hint="Keep one of them.")
        for name, value in layer.items():
            if name not in known:
                raise UsageError(f"{origin}: there is no setting {name!r}", hint="See `batchrunner config show`.")
            if value is not None:
                values[name] = _coerce(name, value, origin)
                origins[name] = origin
                # The stronger layer decides whether there is one upstream or several.
                for other in _EXCLUDED.get(name, ()):
                    values.pop(other, None)
                    origins[other] = "default"
    settings = Settings(**values)  # type: ignore[arg-type]
    _check(settings)
    return settings, origins


def describe() -> list[tuple[str, object, str]]:
    """Name, default and meaning of every setting, in the order of the class."""
    return [
        (knob.name, knob.default if knob.default is not MISSING else None, knob.metadata["meaning"])
        for knob in fields(Settings)
    ]


_HINTS = get_type_hints(Settings)


def _coerce(name: str, value: object, origin: str) -> object:
    """Bring text or a TOML value to the setting's type."""
    hint = _HINTS[name]
    kinds = set(get_args(hint)) | {hint}
    what = f"{origin}: {name}"
    if name == "upstream" or hint is bool:
        return read_targets(value, origin) if name == "upstream" else _truth(value, what)
    if tuple[str, ...] in kinds:
        return tuple(value.split(",")) if isinstance(value, str) else tuple(str(part) for part in _listed(value, what))
    if isinstance(value, str) and str not in kinds:
        if value.strip().lower() in ("", "auto", "none") and type(None) in kinds:
            return None
        if name.endswith("_s"):
            return parse_duration(value, what=what)
        if "bytes" in name:
            return parse_size(value, what=what)
        return _number(value, what)
    if float in kinds and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, bool) or not isinstance(value, tuple(kind for kind in kinds if isinstance(kind, type))):
        raise UsageError(f"{what}: {value!r} does not fit")
    return value


_WORDS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


def _truth(value: object, what: str) -> bool:
    found = _WORDS.get(str(value).strip().lower())
    if found is None:
        raise UsageError(f"{what}: {value!r} is neither true nor false")
    return found


def _listed(value: object, what: str) -> Sequence[object]:
    if isinstance(value, (list, tuple)):
        return value
    raise UsageError(f"{what}: {value!r} is not a list")


def _number(text: str, what: str) -> int:
    try:
        return int(text.replace("_", "").replace(",", ""))
    except ValueError:
        raise UsageError(f"{what}: {text!r} is not a whole number") from None


_AT_LEAST = {
    "concurrency": 1,
    "window_max": 1,
    "workers": 1,
    "rpm": 1,
    "tpm": 1,
    "max_tries": 1,
    "shard_lines_max": 1,
    "shard_bytes_max": 1,
    "lines_max": 1,
    "line_bytes_max": 2,
    "custom_id_chars_max": 1,
    "memory_bytes_max": MIB,
    "api_threads": 1,
    "webhook_concurrency": 1,
    "port": 0,
    "lease_s": 4.0,
    "request_timeout_s": 0.001,
    "idle_timeout_s": 0.001,
    "s3_threads": 1,
    "s3_timeout_s": 0.1,
    "s3_part_bytes": 8 * MIB,
    "segment_bytes": 1,
}
_AT_MOST = {"s3_part_bytes": 16 * MIB}
_ONE_OF = {
    "dialects": (AUTO, "openai"),
    "s3_addressing": ("auto", "path", "virtual"),
    "s3_sse": (None, "AES256", "aws:kms", "aws:kms:dsse"),
}


def _check(settings: Settings) -> None:
    for name, least in _AT_LEAST.items():
        value = getattr(settings, name)
        if value is not None and value < least:
            raise UsageError(f"{name} is {value}, at least {least}")
    for name, most in _AT_MOST.items():
        if (value := getattr(settings, name)) > most:
            raise UsageError(f"{name} is {value}, at most {most}")
    for name, words in _ONE_OF.items():
        if (value := getattr(settings, name)) not in words:
            raise UsageError(f"{name} is {value!r}, not one of {', '.join(word for word in words if word)}")
    for price in settings.prices:
        parse_price(price)
    if settings.renew_s >= settings.lease_s - 3:
        raise UsageError(f"renew_s is {settings.renew_s}, it must be less than lease_s - 3 = {settings.lease_s - 3}")
