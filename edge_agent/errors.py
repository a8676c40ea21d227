"""What can go wrong with models on this device, beside the errors that both ends of the wire know.

PullFailed              502  retryable: what was downloaded is kept, the next pull goes on from there
├── AccessDenied        403  the server wants credentials, or a licence accepted
├── SourceMissing       404  no such file at the source
├── ChecksumMismatch    502  what came is not what was asked for
└── DiskFull            507
ModelBusy               409  it is loaded, or somebody else is pulling it
NotEnoughMemory         507  it cannot be loaded beside what must stay
"""

from shared.errors import CausewayError


class PullFailed(CausewayError):
    """The model could not be had; what was there before is still there."""

    code, status, retryable = "pull_failed", 502, True


class AccessDenied(PullFailed):
    code, status, retryable = "access_denied", 403, False


class SourceMissing(PullFailed):
    code, status, retryable = "source_missing", 404, False


class ChecksumMismatch(PullFailed):
    """What came is not what was asked for."""

    code, retryable = "checksum_mismatch", False


class DiskFull(PullFailed):
    code, status, retryable = "disk_full", 507, False


class ModelBusy(CausewayError):
    code, status = "model_busy", 409


class NotEnoughMemory(CausewayError):
    code, status = "not_enough_memory", 507
