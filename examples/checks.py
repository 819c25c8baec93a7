"""What the scripts beside it look at before they load a model."""

import errno
import os
import socket

from sorted_llama.modeling_sorted_llama.configuration_sorted_llama import check_exit_layer, check_exit_layers


def read_depths(texts: list[str], num_hidden_layers: int, name: str) -> list[int]:
    """The depths that the flag `name` lists, numbers of layers or `every:N`; `ValueError` if the model lacks one."""
    depths: list[int] = []
    for text in texts:
        if text.startswith("every:"):
            depths += check_exit_layers(text, num_hidden_layers, name)
        else:
            depths.append(check_exit_layer(int(text) if text.isdecimal() else text, num_hidden_layers, name))
    return list(dict.fromkeys(depths))


def check_port(host: str, port: int) -> None:
    """Raise a `ValueError` if a server could not listen there: the port is taken, not allowed, or no port."""
    if not 0 <= port <= 65535:
        raise ValueError(f"`port` must be a number from 0 to 65535, got {port}.")
    try:
        for family, _, _, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
            socket.create_server(address[:2], family=family).close()
    except socket.gaierror as error:
        raise ValueError(f"{host} is no address to listen at: {error}.") from error
    except OSError as error:
        if error.errno in (errno.EADDRINUSE, errno.EACCES):  # what else there is, the server knows better
            raise ValueError(
                f"Port {port} of {host} cannot be used ({os.strerror(error.errno)}): pass another."
            ) from error
