"""
transformers' own OpenAI-compatible server with a sorted model. A request names its depth, or its mode, in
`generation_config`: a JSON string of whatever `generate` knows.

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
    extra_body={"generation_config": '{"exit_layer": 10, "max_new_tokens": 64}'},
)
```

With `--continuous-batching`, all requests run at the depth of the checkpoint's config, and one that asks for another
is refused: never another depth than asked for.
"""

import transformers
import typer
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from transformers.cli.serve import Serve
from transformers.cli.serving import server, utils

from modeling_sorted_llama import SortedLlamaForCausalLM
from modeling_sorted_llama.generation_sorted_llama import check_continuous_batching


class CheckedManager(utils.CBGenerateManager):
    """Continuous batching that looks at every request's depth; transformers' own looks at the first request alone."""

    def init_cb(self, model, gen_config):
        check_continuous_batching(model, gen_config, {})
        super().init_cb(model, gen_config)


def build_server(*args, _build=server.build_server, **kwargs) -> FastAPI:
    """transformers' server, which answers a bad argument of `generate` with its message in place of a bare 500."""
    app = _build(*args, **kwargs)

    @app.exception_handler(ValueError)
    async def refuse(request: Request, error: ValueError) -> JSONResponse:
        return JSONResponse({"error": {"message": str(error), "type": "invalid_request_error"}}, status_code=400)

    return app


# The server's seams: it looks the class of an architecture up in `transformers`, and these two when it starts
transformers.SortedLlamaForCausalLM = SortedLlamaForCausalLM
server.build_server = build_server
utils.CBGenerateManager = CheckedManager

if __name__ == "__main__":
    typer.run(Serve)
