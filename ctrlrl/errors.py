"""The errors a user can meet. Each says what was given, what is required and what to change."""


class CtrlrlError(Exception):
    """Base of every error that is the user's to fix; the command line prints it without a traceback and exits with 2."""


class RecipeError(CtrlrlError, ValueError):
    """A recipe or a --set option is malformed, has an unknown key, or contradicts itself."""


class ControlError(CtrlrlError, ValueError):
    """A control is out of range or cannot be parsed."""


class DataError(CtrlrlError, ValueError):
    """A data file is missing, malformed or inconsistent; names the file and, where there is one, the line."""


class ModelError(CtrlrlError, ValueError):
    """A model directory or hub name is missing, or is not the kind of model that is required."""


class RunError(CtrlrlError, RuntimeError):
    """A run directory cannot be used as asked: another recipe, a damaged checkpoint, a relative path in a submitted job."""


class StorageError(RunError):
    """The disk refuses: it is full, over quota, read-only, or closed to this user; names the file and what to do."""


class PlacementError(CtrlrlError, RuntimeError):
    """The cluster cannot give the resources that were asked for."""


class WorkerLost(CtrlrlError, RuntimeError):
    """A worker process or its node died and could not be replaced; names the worker and the node."""


class GroupLost(WorkerLost):
    """A rank of a group died or hangs, and the others were ended with it; the job goes back to its last checkpoint."""


class DeadlineExceeded(CtrlrlError, TimeoutError):
    """A wait reached its deadline; names what was waited for."""


class VersionMismatch(CtrlrlError, RuntimeError):
    """Samples or weights carry another policy version than the one required."""
