"""`ctrlrl serve`: one model behind OpenAI's HTTP, its dials in the operator's hands.

The engine has a process of its own, which is started first and ends with this one; the HTTP and what is ours run here. SIGHUP reads the
file of dials again.
"""

import asyncio
import contextlib
import gc
import ipaddress
import os
import signal
import sys
import time
from typing import Annotated

import typer

from jobs.parts.launch import Set, mistakes_told

# Threads that wait must not spin, since the engine and the HTTP share the cores, and none may be there when the engine is forked.
# Read when torch, NumPy and vLLM are imported.
_ENVIRONMENT = {
    "OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0", "OPENBLAS_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false",
    "VLLM_LOGGING_LEVEL": "ERROR",
}  # fmt: skip


def main(
    model: Annotated[str, typer.Argument(help="Model to serve: a directory such as runs/mine/model, or a hub name.")] = "",
    dials: Annotated[str, typer.Option(help="TOML file of keys and dials; without one, this machine alone and everything allowed.")] = "",
    overrides: Set = None,
    host: Annotated[str, typer.Option(help="Address to listen on; any but this machine's own needs keys.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.")] = 8000,
    name: Annotated[str, typer.Option(help="The model's name for clients; else its directory's.")] = "",
    new_key: Annotated[str, typer.Option("--new-key", metavar="NAME", help="Print a fresh key and its line for [keys], and end.")] = "",
) -> None:
    with mistakes_told():
        if new_key:
            raise SystemExit(print_key(new_key))
        os.environ.update({key: value for key, value in _ENVIRONMENT.items() if key not in os.environ})
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # until the server runs; ends the engine's process, too
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        import uvloop

        from jobs.parts.serving import load_serving

        raise SystemExit(uvloop.run(_serve(load_serving(model, dials, overrides or [], name), host, port)))


def print_key(name: str) -> int:
    """Print a key, which is stored nowhere, and the line by which a server knows it."""
    from ctrlrl.errors import RecipeError
    from ctrlrl.serving.policies import NAME, hashed, new_key

    if not NAME.fullmatch(name):
        raise RecipeError(f"--new-key {name!r} is not a name: use letters, digits, '.', '_' and '-'")
    key = new_key()
    print(f"key (shown once): {key}\nunder [keys]:     {name} = \"{hashed(key)}\"")
    return 0


def check_address(host: str, keyless: bool) -> None:
    """Raise RecipeError for a server that others could reach, and that asks for no key."""
    from ctrlrl.errors import RecipeError

    local = host == "localhost"
    with contextlib.suppress(ValueError):
        local = ipaddress.ip_address(host).is_loopback
    if keyless and not local:
        raise RecipeError(f"--host {host} is reached by others, and no keys are set: give --dials with [keys], or --host 127.0.0.1")


async def _serve(serving, host: str, port: int) -> int:
    check_address(host, not serving.config.keys)
    sock = _bound(host, port)
    os.register_at_fork(after_in_child=lambda: _part_from(sock))
    began = time.perf_counter()
    service = await serving.start()
    try:
        return await _until_stopped(serving, service, sock, began)
    finally:
        service.close()
        service.model.close()


def _part_from(sock) -> None:
    """In a fork: leave the server its port and its signals, which a process otherwise tells its event loop through a pipe."""
    sock.close()
    signal.set_wakeup_fd(-1)


async def _until_stopped(serving, service, sock, began: float) -> int:
    import uvicorn

    from ctrlrl.serving.app import build_app

    class Server(uvicorn.Server):
        @contextlib.contextmanager
        def capture_signals(self):
            yield  # they are handled below

    grace = serving.config.limits.grace_s
    settings = uvicorn.Config(
        build_app(service), log_level="warning", access_log=False, lifespan="off", timeout_graceful_shutdown=max(1, round(grace)),
        server_header=False, proxy_headers=False, h11_max_incomplete_event_size=65536,
    )  # fmt: skip
    server, loop = Server(settings), asyncio.get_running_loop()

    def stop() -> None:
        if server.should_exit:
            server.force_exit = True
        server.should_exit = True
        _say(f"stopping: {service.gate.running} requests under way have {grace:g} s (Ctrl-C again to stop at once)")

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop)
    loop.add_signal_handler(signal.SIGHUP, _reload, serving, service)
    sock.listen(settings.backlog)  # whoever reads the address below may connect at once
    address, bound = sock.getsockname()[:2]
    shown = f"[{address}]" if ":" in address else address
    _say(f"model {service.model.name!r} on http://{shown}:{bound} after {time.perf_counter() - began:.0f} s: {serving.summary(service)}")
    gc.collect()
    gc.freeze()  # what is here now stays: collections during answers need not look at it
    watch = asyncio.create_task(_watch(service, server))
    await server.serve([sock])
    watch.cancel()
    if not service.model.healthy:
        _say("the engine has ended; see above")
        return 1
    return 0


async def _watch(service, server) -> None:
    """Stop a server whose engine is gone, so that whoever looks after it starts it anew."""
    while service.model.healthy:
        await asyncio.sleep(1)
    server.should_exit = True


def _reload(serving, service) -> None:
    """Read the file of dials again; a bad one is told, and the old policies stay."""
    from ctrlrl.errors import CtrlrlError

    try:
        fresh = serving.again()
        if fresh.config.engine != serving.config.engine:
            _say("engine settings take effect at the next start")
        service.take(fresh.config)
    except CtrlrlError as error:
        _say(f"the dials stay as they were: {error}")
    else:
        _say(f"dials read again: {serving.summary(service)}")


def _bound(host: str, port: int):
    """A socket that listens on the address; RunError if it cannot."""
    import socket

    from ctrlrl.errors import RunError

    try:
        family, kind, _, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family, kind)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(place)
        sock.listen(2048)  # who comes before the model is there waits
    except (OSError, OverflowError) as error:
        raise RunError(f"cannot listen on {host}:{port}: {error}: give another --host or --port") from None
    return sock


def _say(line: str) -> None:
    print(f"ctrlrl serve: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    typer.run(main)
