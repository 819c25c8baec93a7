"""
Several depths of one checkpoint at once: a vLLM server for each, and a configuration of LiteLLM that makes them models
of one address, `name@10`, `name@20`, `name@full`.

```shell
python examples/serve_depths.py out/demo/final --depths 10 20 full
pip install "litellm[proxy]"                     # in another terminal; it wants a key, which clients then send
LITELLM_MASTER_KEY=sk-1234 litellm --config out/demo/final.litellm.yaml
```

Each server holds the weights of its own layers, and its own keys and values. Other flags, `--max-model-len 4096` say,
go to all of them.
"""

import argparse
import importlib.util
import json
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import yaml
from checks import check_port, read_depths

from sorted_llama.hub_card.checkpoint import load_config
from sorted_llama.trainer.escaping import one_line


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


def choose_ports(path: str, texts: list[str], first: int) -> dict[str, int]:
    """The port of each model `name@depth`; `ValueError` if the checkpoint lacks a depth, or a port cannot be used."""
    layers, depths = load_config(path).num_hidden_layers, []
    for text in texts:
        depths += ["full"] if text == "full" else map(str, read_depths([text], layers, "--depths"))
    name = Path(path).resolve().name
    ports = {f"{name}@{depth}": first + i for i, depth in enumerate(dict.fromkeys(depths))}
    for port in ports.values():
        check_port("0.0.0.0", port)
    return ports


def write_routes(path: str, ports: dict[str, int]) -> Path:
    """LiteLLM's configuration, beside the checkpoint's folder; returns the file."""
    folder = Path(path).resolve().parent if Path(path).is_dir() else Path()
    file = folder / f"{Path(path).resolve().name}.litellm.yaml"
    routes = []
    for model, port in ports.items():
        server = {"model": f"openai/{model}", "api_base": f"http://localhost:{port}/v1", "api_key": "none"}
        routes.append({"model_name": model, "litellm_params": server})
    file.write_text(yaml.safe_dump({"model_list": routes}, sort_keys=False))
    return file


def serve(path: str, ports: dict[str, int], flags: list[str]) -> None:
    """Run the servers until one of them ends, which is a `RuntimeError`; whatever happens, none is left running."""
    config, servers = write_routes(path, ports), []
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # stops the servers, too
    try:
        for model, port in ports.items():
            servers.append(start_server(path, model.rpartition("@")[2], port, *flags, name=model))
            wait_until_up(servers[-1], port)  # one after the other: each looks at how much memory is free
        print(f"Up: {', '.join(f'{model} (port {port})' for model, port in ports.items())}")
        print(f"One address for all: LITELLM_MASTER_KEY=sk-1234 litellm --config {config}", flush=True)
        while all(server.poll() is None for server in servers):
            time.sleep(1)
        raise RuntimeError("A server has ended: see what it printed. The others are stopped.")
    finally:
        for server in servers:
            server.terminate()
        for server in servers:
            server.wait()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("path", help="of the checkpoint")
    parser.add_argument(
        "--depths", nargs="+", default=["full"], help='numbers of layers, "full", or every:N for every Nth layer'
    )
    parser.add_argument("--port", type=int, default=8001, help="of the first; the others count on")
    args, flags = parser.parse_known_args()
    if sys.argv[1:2] != [args.path]:
        parser.error("the path of the checkpoint comes first: before it, a flag's value would be taken for it")
    try:
        ports = choose_ports(args.path, args.depths, args.port)
        if importlib.util.find_spec("vllm") is None:
            raise ValueError("vLLM is not installed here: pip install vllm")
        serve(args.path, ports, flags)
    except (OSError, RuntimeError, ValueError) as error:
        raise SystemExit(one_line(error)) from error
    except KeyboardInterrupt:
        pass


if __name__ == "__main__":
    main()
