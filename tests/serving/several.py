"""Runs several `ctrlrl` commands at a time, in forks of one process that has the imports of `ctrlrl serve`: they are most of a start.

The argument is JSON: name -> [file for its standard error, arguments]. Prints name and process id of each, and the exit code when it ends.
"""

import json
import os
import sys

if __name__ == "__main__":
    import uvloop  # noqa: F401
    import vllm.entrypoints.openai.chat_completion.serving
    import vllm.v1.engine.async_llm
    import vllm.v1.worker.cpu_worker  # noqa: F401

    import jobs.parts.serving  # noqa: F401
    from ctrlrl.cli import main

    names = {}
    for name, (log, arguments) in json.loads(sys.argv[1]).items():
        child = os.fork()
        if not child:
            os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT), 2)
            sys.argv[1:] = arguments
            main()
        names[child] = name
        print(json.dumps([name, "pid", child]), flush=True)
    while names:
        child, status = os.wait()
        print(json.dumps([names.pop(child), "code", os.waitstatus_to_exitcode(status)]), flush=True)
