"""
transformers' own OpenAI-compatible server with a sorted model. A request names its depth, or its mode, in
`generation_config`: whatever `generate` knows, as an object or as a JSON string of one.

```shell
pip install -e ".[serve]"
python examples/serve.py out/demo/final        # --help: all options of `transformers serve`
```

```python
from openai import OpenAI

client = OpenAI(base_url="http://localhost:8000/v1", api_key="none")
reply = client.chat.completions.create(
    model="out/demo/final",
    messages=[{"role": "user", "content": "What is the capital of Peru?"}],
    extra_body={"generation_config": {"exit_layer": 10, "max_new_tokens": 64}},
)
print(reply.choices[0].message.content)
```

With `--continuous-batching`, all requests run at the depth of the checkpoint's config, and one that asks for another
is refused: never another depth than asked for.
"""

import errno
import functools
import json
import socket
from typing import Any

import typer
from safetensors import SafetensorError
from transformers import GenerationConfig
from transformers.cli.serve import Serve
from transformers.cli.serving import model_manager, server, utils
from transformers.utils.import_utils import is_serve_available

from sorted_llama import SortedLlamaForCausalLM
from sorted_llama.hub_card.checkpoint import load_config
from sorted_llama.modeling_sorted_llama.modes_sorted_llama import (
    SORTED_GENERATION_FIELDS,
    check_continuous_batching,
    choose_decoding,
    read_decoding_fields,
)
from sorted_llama.trainer.escaping import one_line


# What transformers uses where nothing is set, for the types; the model and `GenerationConfig` look at the others
_DEFAULTS = {"max_new_tokens": 1, "min_new_tokens": 0, **GenerationConfig._get_default_generation_params()}
_OF_SEVERAL_TYPES = ("early_stopping", "num_assistant_tokens")
_KINDS = {bool: "true or false", int: "an integer", float: "a number"}


def read_generation_config(given: Any) -> dict[str, Any]:
    """The fields of a request's `generation_config`, an object or a JSON string of one; or a `ValueError`."""
    wanted = '`generation_config` must be an object like {"exit_layer": 10}, or a JSON string of one'
    try:
        fields = json.loads(given) if isinstance(given, str) else given
    except json.JSONDecodeError as error:
        raise ValueError(f"{wanted}, got {given!r}: {error}.") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{wanted}, got {given!r}.")
    known = {*GenerationConfig().to_dict(), *SORTED_GENERATION_FIELDS}
    if unknown := [name for name in fields if name not in known]:
        raise ValueError(f"`generation_config` has unknown fields: {', '.join(map(repr, unknown))}.")
    fields.pop("_from_model_config", None)  # with it, transformers passes over the fields that it does not know
    for name, value in fields.items():
        kind = type(_DEFAULTS.get(name))
        fits = value is None or type(value) is kind or (kind is float and type(value) is int)
        if kind in _KINDS and name not in _OF_SEVERAL_TYPES and not fits:
            raise ValueError(f"`{name}` of `generation_config` must be {_KINDS[kind]}, got {value!r}.")
    try:
        GenerationConfig(**fields)
    except (TypeError, AttributeError) as error:
        raise ValueError(f"`generation_config` has a value of a wrong type: {one_line(error)}.") from error
    return fields


def check_depth(model, generation_config: GenerationConfig, batched: bool = False) -> None:
    """Refuse what decoding would refuse, before a stream has begun; `batched` requests have the config's depth."""
    if not isinstance(model, SortedLlamaForCausalLM):
        for name in SORTED_GENERATION_FIELDS:
            if getattr(generation_config, name, None) is not None:
                raise ValueError(f"`{name}` is for sorted Llamas, and this model is a {type(model).__name__}.")
    elif batched:
        check_continuous_batching(model, generation_config, {})
    else:
        choose_decoding(model, generation_config, read_decoding_fields(model, generation_config, {}))


class CheckedManager(utils.GenerateManager):
    """Looks at a request before it decodes, so that what is wrong is a 400 in streams, too."""

    def generate_streaming(self, model, processor, inputs, gen_config, *args, **kwargs):
        check_depth(model, gen_config)
        return super().generate_streaming(model, processor, inputs, gen_config, *args, **kwargs)

    async def generate_non_streaming(self, model, processor, inputs, gen_config, *args, **kwargs):
        check_depth(model, gen_config)
        try:
            return await super().generate_non_streaming(model, processor, inputs, gen_config, *args, **kwargs)
        except TypeError as error:
            raise ValueError(f"`generate` does not take a value of this request: {one_line(error)}.") from error


class CheckedBatchManager(utils.CBGenerateManager):
    """Continuous batching that looks at every request's depth; transformers' own looks at the first request alone."""

    def init_cb(self, model, gen_config):
        check_depth(model, gen_config, batched=True)
        super().init_cb(model, gen_config)


def build_server(*handlers, _build=server.build_server, **options):
    """transformers' server, which takes objects for `generation_config`, and answers what is wrong with a 400."""
    from fastapi.responses import JSONResponse

    def checked(handle):
        async def handle_request(body, *args):
            if isinstance(body, dict) and body.get("generation_config") is not None:
                fields = read_generation_config(body["generation_config"])
                body = {**body, "generation_config": json.dumps(fields)}  # all that transformers takes
            return await handle(body, *args)

        return handle_request

    for handler in (*handlers, *options.values()):
        if isinstance(handler, utils.BaseHandler):
            handler.handle_request = checked(handler.handle_request)
    app = _build(*handlers, **options)

    @app.exception_handler(ValueError)
    async def refuse(_, error: ValueError) -> JSONResponse:
        return JSONResponse({"error": {"message": str(error), "type": "invalid_request_error"}}, status_code=400)

    return app


def check_model(name: str) -> None:
    """A `ValueError` unless the config of a model, `id@revision` or a folder, is a sorted Llama's."""
    path, revision = utils.split_revision(name)
    classes = load_config(path, revision).architectures or ["model without a class"]
    if classes != [SortedLlamaForCausalLM.__name__]:
        raise ValueError(f"{path} is no sorted Llama but a {', '.join(classes)}: `transformers serve` serves it.")


def check_port(host: str, port: int) -> None:
    """A `ValueError` if a server could not listen there: the port is taken, not allowed, or no port."""
    if not 0 <= port <= 65535:
        raise ValueError(f"`port` must be a number from 0 to 65535, got {port}.")
    try:
        for family, _, _, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
            socket.create_server(address[:2], family=family).close()
    except OSError as error:  # what else there is, the server knows better
        if isinstance(error, socket.gaierror) or error.errno in (errno.EADDRINUSE, errno.EACCES):
            raise ValueError(f"Port {port} of {host} cannot be used: {error.strerror}.") from error


@functools.wraps(Serve)
def serve(**options):
    if not is_serve_available():
        raise SystemExit('The server needs more packages: pip install -e ".[serve]"')
    try:
        check_port(options["host"], options["port"])
        if options["force_model"] is not None:
            check_model(options["force_model"])
        Serve(**options)
    except (ImportError, OSError, ValueError, SafetensorError) as error:
        raise SystemExit(f"The server does not start: {one_line(error)}") from error


# The server's seams: it looks the class of an architecture up in `transformers`, and these when it starts
model_manager.transformers.SortedLlamaForCausalLM = SortedLlamaForCausalLM
server.build_server = build_server
utils.GenerateManager = CheckedManager
utils.CBGenerateManager = CheckedBatchManager

if __name__ == "__main__":
    typer.run(serve)
