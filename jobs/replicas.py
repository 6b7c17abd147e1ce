"""`ctrlrl serve` on a Ray cluster: a Ray Serve application whose replicas come and go with the load. cluster/serve.yaml deploys it.

Each replica is a whole server, with an engine and limits of its own. It looks at the file of dials whenever Ray asks after its health.
"""

from pathlib import Path

from ctrlrl.config import Section
from ctrlrl.errors import CtrlrlError, RecipeError


class ReplicaConfig(Section):
    """The application's arguments: as those of the command. model and dials are paths that every node can read."""

    model: str
    dials: str
    name: str = ""
    overrides: tuple[str, ...] = ()


class Replica:
    """One server among several."""

    async def __init__(self, config: ReplicaConfig):
        from jobs.parts.serving import load_serving

        self._stamp = _stamp(config.dials)
        self._serving = load_serving(config.model, config.dials, config.overrides, config.name)
        if not self._serving.config.keys:
            raise RecipeError(f"{config.dials} has no [keys]: a server on a cluster is reached by others")
        self._service = await self._serving.start()

    def __serve_build_asgi_app__(self):
        from ctrlrl.serving.app import build_app

        return build_app(self._service)

    async def check_health(self) -> None:
        """Raise RuntimeError if the engine has ended, so that Ray replaces the replica; take new dials where the file has changed."""
        if not self._service.model.healthy:
            raise RuntimeError("the engine has ended")
        stamp = _stamp(self._serving.dials)
        if stamp != self._stamp:
            self._stamp = stamp
            try:
                fresh = self._serving.again().config
                if not fresh.keys:
                    raise RecipeError("there are no [keys] in it")
                self._service.take(fresh)
            except CtrlrlError as error:
                print(f"ctrlrl serve: the dials stay as they were: {error}", flush=True)

    def __del__(self):
        service = getattr(self, "_service", None)
        if service is not None:
            service.close()
            service.model.close()


def deployment():
    """The Ray Serve deployment; how many replicas there are, and on what, its file says."""
    from ray import serve

    return serve.deployment(serve.ingress()(Replica), name="ctrlrl")


def build(arguments: dict):
    """The Ray Serve application; RecipeError for wrong arguments."""
    from ctrlrl.config import load

    return deployment().bind(load(ReplicaConfig, None, settings=arguments))


def _stamp(path: str) -> tuple:
    """What changes when a file does; a mounted Secret is another file then."""
    try:
        found = Path(path).stat()
    except OSError:
        return ()
    return found.st_ino, found.st_mtime_ns, found.st_size
