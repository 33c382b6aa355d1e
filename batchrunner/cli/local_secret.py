"""What signs the notifications of runs on this machine: a variable, or a file that is made once."""

from __future__ import annotations

import os

from batchrunner.cli.server_folder import home_folder
from batchrunner.clock import SystemRng
from batchrunner.webhooks import SECRET_BYTES, check_secret, secret_of

# The variable from which the SDKs take what they verify with.
VARIABLE = "OPENAI_WEBHOOK_SECRET"


def local_secret() -> str:
    """Give the secret of this user's runs, the same for all of them.

    Raises:
        UsageError: what the variable or the file holds is no signing secret.
    """
    if given := os.environ.get(VARIABLE):
        return check_secret(given)
    path = home_folder() / "webhook_secret"
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as stream:
        stream.write(secret_of(SystemRng().token_hex(SECRET_BYTES)) + "\n")
    try:
        # Only the first of two that come at once makes it.
        path.hardlink_to(fresh)
    except FileExistsError:
        pass
    finally:
        fresh.unlink()
    return check_secret(path.read_text(encoding="utf-8").strip())
