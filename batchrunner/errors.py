"""The exception tree. Each error carries a stable code, an HTTP status and a hint that says what to do.

BatchrunnerError
├── CallerError                 the request, file or command is at fault
│   ├── UsageError              a flag, setting or argument does not fit
│   ├── InputInvalid            the input file has problems, nothing was sent
│   ├── InputChanged            the input is not the file that was validated
│   ├── RunDiffers              the state folder belongs to another run
│   ├── OutputExists            the output was not written by us
│   ├── AlreadyRunning          another process works on the same state folder
│   ├── PortTaken               the address to listen on is not to be had
│   ├── NotFound                no such batch, file or blob
│   ├── TransitionRefused       a status and event that are not in the lifecycle table
│   ├── KeyRefused              no API key, or none that is valid
│   ├── PermissionRefused       the key does not cover the request
│   ├── QuotaExceeded           a limit of the key is reached
│   ├── PayloadTooLarge         the body is larger than the server takes
│   ├── IdempotencyRunning      the first request with the Idempotency-Key has not ended
│   ├── IdempotencyMismatch     the Idempotency-Key was used for another request
│   └── FolderUnsuitable        the state folder lies where locks or sync cannot be trusted
├── PeerError                   the upstream is at fault
│   ├── UpstreamUnreachable     no request of this process was ever answered
│   ├── AuthenticationRefused   every line was answered 401 or 403
│   ├── ModelUnknown            every line was answered "no such model or route"
│   ├── ServerUnavailable       a batch server does not answer, or cannot work now
│   ├── ServerRefused           a batch server refused a request of the command line
│   └── WebhookUnreachable      the receiver of a test did not answer
└── OwnError                    our side or its disk, database or network is at fault
    ├── StoreUnavailable        the database cannot be reached or is locked for too long
    ├── SchemaNewer             the database was written by a newer version
    ├── BlobsUnavailable        the folder or bucket cannot be read or written
    ├── DiskFull                there is no space left
    ├── NameTaken               a name that must be new exists already
    ├── Fenced                  a newer epoch owns the task
    ├── JournalCorrupt          registered bytes do not match their checksum
    ├── ReconciliationError     the ledger does not add up
    ├── TaskParked              a task failed too often without progress
    └── WorkerLost              worker processes die as soon as they start
"""

from __future__ import annotations

from typing import ClassVar


class BatchrunnerError(Exception):
    """Root of all errors that batchrunner raises on purpose; `code` is stable, `hint` says what the reader can do."""

    code: ClassVar[str] = "batchrunner_error"
    http_status: ClassVar[int] = 500
    hint: ClassVar[str] = "This is a bug in batchrunner; the state is kept. Run the same command again."

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.advice = hint or self.hint


class CallerError(BatchrunnerError):
    """The caller's request, file or command is at fault."""

    code = "invalid_request"
    http_status = 400
    hint = "Correct the request and send it again."


class UsageError(CallerError):
    """A flag, setting or argument does not fit."""

    code = "usage"
    hint = "See `batchrunner COMMAND --help`."


class InputInvalid(CallerError):
    """The input file has problems and nothing was sent."""

    code = "input_invalid"
    hint = "Mend the lines named, or skip them with --on-invalid skip."


class InputChanged(CallerError):
    """The input's bytes are not those that were validated."""

    code = "input_changed"
    http_status = 409
    hint = "Put the original input back, or start over with --fresh (the old results are kept beside it)."


class RunDiffers(CallerError):
    """The state folder belongs to a run with another identity."""

    code = "run_differs"
    http_status = 409
    hint = "Use another output, or start over with --fresh (the old results are kept beside it)."


class OutputExists(CallerError):
    """The output path holds something that this run did not write."""

    code = "output_exists"
    http_status = 409
    hint = "Choose another output, or replace it with --fresh."


class AlreadyRunning(CallerError):
    """Another process works on the same state folder."""

    code = "already_running"
    http_status = 409
    hint = "Wait for the other process, or stop it; its work is kept."


class PortTaken(CallerError):
    """The address to listen on belongs to somebody else, or is not one of this machine."""

    code = "port_taken"
    http_status = 409
    hint = "Stop what listens there, or choose another port with --port."


class NotFound(CallerError):
    """No such batch, file, task or blob."""

    code = "not_found"
    http_status = 404
    hint = "Check the id or path."


class TransitionRefused(CallerError):
    """The lifecycle table has no such event in this status; nothing was changed."""

    code = "transition_refused"
    http_status = 409
    hint = "Read the batch's status first; a finished batch does not change."


class KeyRefused(CallerError):
    """The request has no API key, or one that is unknown, revoked or expired."""

    code = "key_refused"
    http_status = 401
    hint = "Send a valid key as `Authorization: Bearer KEY`; `batchrunner keys create` makes one."


class PermissionRefused(CallerError):
    """The key is valid, but does not cover the request."""

    code = "permission_refused"
    http_status = 403
    hint = "Use a key with the scope or limit that the request needs."


class QuotaExceeded(CallerError):
    """A limit of the key is reached: its rate, its open batches or its queued lines."""

    code = "quota_exceeded"
    http_status = 429
    hint = "Wait until batches have ended, or have the key's limits raised."


class PayloadTooLarge(CallerError):
    """The request's body is larger than the server takes."""

    code = "payload_too_large"
    http_status = 413
    hint = "Send less in one request; a large file can be sent in parts with /v1/uploads."


class IdempotencyRunning(CallerError):
    """The first request with this Idempotency-Key has not ended."""

    code = "idempotency_running"
    http_status = 409
    hint = "Send the request again in a moment: the answer of the first one comes back."


class IdempotencyMismatch(CallerError):
    """The Idempotency-Key was used for another request."""

    code = "idempotency_mismatch"
    http_status = 422
    hint = "Use a new Idempotency-Key for each new request."


class FolderUnsuitable(CallerError):
    """The state folder lies on a file system whose locks or sync cannot be trusted."""

    code = "folder_unsuitable"
    hint = "Put the state on a local disk with --state DIR; the output may stay where it is."


class PeerError(BatchrunnerError):
    """The upstream is at fault."""

    code = "upstream_error"
    http_status = 502
    hint = "Check the upstream with `batchrunner doctor -u URL`."


class UpstreamUnreachable(PeerError):
    """No request of this process was ever answered."""

    code = "upstream_unreachable"
    hint = "Is the server running, and is -u its base URL? Then run the same command again."


class AuthenticationRefused(PeerError):
    """Every line was answered 401 or 403."""

    code = "authentication_refused"
    hint = "Set the key (OPENAI_API_KEY, or --api-key-env NAME), then run the same command again."


class ModelUnknown(PeerError):
    """Every line was answered that its model or route does not exist."""

    code = "model_unknown"
    hint = "See which models the server has with `batchrunner doctor -u URL`."


class ServerUnavailable(PeerError):
    """A batch server does not answer, or cannot do its work now."""

    code = "server_unavailable"
    hint = "Is `batchrunner serve` running there, and is --server (or BATCHRUNNER_SERVER) its base URL?"


class ServerRefused(PeerError):
    """A batch server refused a request of the command line."""

    code = "server_refused"
    hint = "The message is the server's own; correct what it names and run the same command again."


class WebhookUnreachable(PeerError):
    """The receiver of a test did not answer."""

    code = "webhook_unreachable"
    http_status = 400
    hint = "Is the receiver up, and may the server reach it? See docs/webhooks.md, Where it may lead."


class OwnError(BatchrunnerError):
    """Our side, or its disk, database or network, is at fault."""

    code = "internal_error"


class StoreUnavailable(OwnError):
    """The database cannot be reached, or stayed locked for too long."""

    code = "store_unavailable"
    http_status = 503
    hint = "Nothing is lost; the work goes on when the database answers again."


class SchemaNewer(OwnError):
    """The database was written by a newer version of batchrunner."""

    code = "schema_newer"
    http_status = 503
    hint = "Install the version that wrote it, or a later one."


class BlobsUnavailable(OwnError):
    """The folder or bucket cannot be read or written."""

    code = "blobs_unavailable"
    http_status = 503
    hint = "Nothing is lost; check the folder or bucket, then run the same command again."


class DiskFull(OwnError):
    """There is no space left where results are written."""

    code = "disk_full"
    http_status = 503
    hint = "Make room. What waits for it goes on by itself; a command that has ended goes on when it is run again."


class NameTaken(OwnError):
    """A name that must be new exists already; it is never written over."""

    code = "name_taken"


class Fenced(OwnError):
    """A newer epoch owns the task: whatever the holder still wants to write no longer counts."""

    code = "fenced"
    http_status = 409


class JournalCorrupt(OwnError):
    """Registered bytes do not match their checksum."""

    code = "journal_corrupt"
    hint = "Check the disk, then run the same command again: the damaged lines run again, no others."


class ReconciliationError(OwnError):
    """The ledger does not add up: a line is missing, doubled or foreign. All data is kept."""

    code = "reconciliation_error"
    hint = "Keep the state folder and report this: it must never happen."


class TaskParked(OwnError):
    """A task failed too often without progress and waits for somebody to look."""

    code = "task_parked"
    hint = "Mend the cause named, then run the same command again."


class WorkerLost(OwnError):
    """Worker processes die as soon as they start."""

    code = "worker_lost"
    hint = "See the message of the worker above; run with --workers 1 to stay in one process."
