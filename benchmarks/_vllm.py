"""A vLLM server at one depth."""

import json
import subprocess
import sys
import time
import urllib.error
import urllib.request


def start_server(path: str, depth: str, port: int, *flags: str, name: str | None = None) -> subprocess.Popen:
    """vLLM's OpenAI server at a depth, a number of layers or "full"; what it prints goes where this process prints."""
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", path, "--port", str(port)]
    if depth != "full":
        command += ["--hf-overrides", json.dumps({"exit_layer": int(depth)})]
    if name is not None:
        command += ["--served-model-name", name]
    return subprocess.Popen([*command, *flags])


def wait_until_up(server: subprocess.Popen, port: int) -> None:
    """Wait for a server's first sign of health; `RuntimeError` if it ends before."""
    while server.poll() is None:
        try:
            urllib.request.urlopen(f"http://localhost:{port}/health")
            return
        except urllib.error.URLError:
            time.sleep(0.2)
    raise RuntimeError(f"The server on port {port} ended with status {server.returncode}: see what it printed.")
