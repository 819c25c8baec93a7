"""What the scripts beside it look at before they load a model: what is wrong ends them in one line."""

import errno
import os
import socket

from sorted_llama.hub_card.checkpoint import load_config
from sorted_llama.modeling_sorted_llama import SortedLlamaConfig
from sorted_llama.modeling_sorted_llama.configuration_sorted_llama import check_exit_layer, check_exit_layers
from sorted_llama.trainer.escaping import one_line


def read_config(path: str, revision: str | None = None) -> SortedLlamaConfig:
    """
    The config of a checkpoint.

    Args:
        path (`str`):
            A folder, or an id of the Hub.
        revision (`str`, *optional*):
            Branch, tag or commit on the Hub. Defaults to the main branch.

    Raises:
        SystemExit: If there is none, or if it is none of a Llama; the message is one line.
    """
    try:
        return load_config(path, revision)
    except ValueError as error:
        raise SystemExit(str(error)) from error


def read_depths(texts: list[str], num_hidden_layers: int, name: str) -> list[int]:
    """
    The depths that a flag names: numbers of layers, or `every:N`.

    Args:
        texts (`list[str]`):
            The flag's values.
        num_hidden_layers (`int`):
            Number of decoder layers that the model has.
        name (`str`):
            Of the flag.

    Raises:
        SystemExit: If one of them is no depth of the model.
    """
    depths: list[int] = []
    try:
        for text in texts:
            if text.startswith("every:"):
                depths += check_exit_layers(text, num_hidden_layers, name)
            else:
                depths.append(check_exit_layer(int(text) if text.isdecimal() else text, num_hidden_layers, name))
    except ValueError as error:
        raise SystemExit(str(error)) from error
    return list(dict.fromkeys(depths))


def check_port(host: str, port: int) -> None:
    """
    End the script if a server could not listen there.

    Args:
        host (`str`):
            A name or an address.
        port (`int`):
            Of it.

    Raises:
        SystemExit: If the port is taken, not allowed, or no port.
    """
    if not 0 <= port <= 65535:
        raise SystemExit(f"`port` must be a number from 0 to 65535, got {port}.")
    try:
        for family, _, _, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
            socket.create_server(address[:2], family=family).close()
    except socket.gaierror as error:
        raise SystemExit(f"{host} is no address to listen at: {one_line(error)}.") from error
    except OSError as error:
        if error.errno in (errno.EADDRINUSE, errno.EACCES):  # what else there is, the server knows better
            raise SystemExit(
                f"Port {port} of {host} cannot be used ({os.strerror(error.errno)}): pass another."
            ) from error
