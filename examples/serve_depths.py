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
from checks import check_port, read_config, read_depths


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
    layers, depths = read_config(args.path).num_hidden_layers, []
    for text in args.depths:
        depths += ["full"] if text == "full" else map(str, read_depths([text], layers, "--depths"))
    name = Path(args.path).resolve().name
    ports = {f"{name}@{depth}": args.port + i for i, depth in enumerate(dict.fromkeys(depths))}
    for port in ports.values():
        check_port("0.0.0.0", port)
    if importlib.util.find_spec("vllm") is None:
        raise SystemExit("vLLM is not installed here: pip install vllm")

    routes = [
        {
            "model_name": model,
            "litellm_params": {
                "model": f"openai/{model}",
                "api_base": f"http://localhost:{port}/v1",
                "api_key": "none",
            },
        }
        for model, port in ports.items()
    ]
    config = (Path(args.path).resolve().parent if Path(args.path).is_dir() else Path()) / f"{name}.litellm.yaml"
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # stops the servers, too
    servers = []
    try:
        config.write_text(yaml.safe_dump({"model_list": routes}, sort_keys=False))
        for model, port in ports.items():
            depth = model.rpartition("@")[2]
            servers.append(start_server(args.path, depth, port, *flags, name=model))
            wait_until_up(servers[-1], port)  # one after the other: each looks at how much memory is free
        print(f"Up: {', '.join(f'{model} (port {port})' for model, port in ports.items())}")
        print(f"One address for all: LITELLM_MASTER_KEY=sk-1234 litellm --config {config}", flush=True)
        while all(server.poll() is None for server in servers):
            time.sleep(1)
        raise SystemExit("A server has ended: see what it printed. The others are stopped.")
    except (OSError, RuntimeError) as error:
        raise SystemExit(str(error)) from error
    except KeyboardInterrupt:
        pass
    finally:
        for server in servers:
            server.terminate()
        for server in servers:
            server.wait()


if __name__ == "__main__":
    main()
