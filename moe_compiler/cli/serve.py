"""`moe-compiler serve`: transformers' own HTTP server, with a compiled model in it."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable
from typing import Any

from transformers.cli.serve import Serve
from transformers.utils.import_utils import is_serve_available

from moe_compiler.cli.models import device_of, is_compiled, quiet, switch_profile
from moe_compiler.cli.names import model_path
from moe_compiler.cli.output import print_text


def run(options: argparse.Namespace) -> None:
    """Serves until it is interrupted."""
    if not is_serve_available():
        raise ImportError("the server needs more packages: pip install 'moe-compiler[serve]'")
    logging.basicConfig(format="%(levelname)s:     %(message)s")  # as the server's own lines
    logging.getLogger("moe_compiler").setLevel(logging.INFO)  # the drift guard says what it does

    def prepare(model: Any) -> None:
        switch_profile(model, options.profile)
        if options.on_drift is not None:
            if not is_compiled(model):
                raise ValueError("`--on-drift` must be left out where the model was not compiled: it has no profiles")
            model.runtime.on_drift(options.on_drift)
        print_text(
            f"serving {options.model} on http://{options.host}:{options.port}/v1 "
            f"as the model {model_path(options.model)!r}; Ctrl-C stops it"
        )

    quiet()
    PreparedServer(
        prepare,
        force_model=model_path(options.model),
        device=device_of(options.device),
        dtype=options.dtype,
        host=options.host,
        port=options.port,
        log_level=options.log_level,
    )


class PreparedServer(Serve):  # type: ignore[misc]  # transformers is untyped here
    """Transformers' server of one model that is made ready before the first request.

    Args:
        prepare: called with the loaded model.
        **options: those of `transformers serve`; `force_model` among them.
    """

    def __init__(self, prepare: Callable[[Any], None], **options: Any) -> None:
        self._prepare = prepare
        super().__init__(**options, non_blocking=True)

    def start_server(self) -> None:
        """Makes the model ready and serves until the server is told to stop."""
        (loaded,) = self._model_manager.loaded_models.values()
        self._prepare(loaded.model)
        if not getattr(getattr(loaded.processor, "tokenizer", loaded.processor), "chat_template", None):
            print_text("its tokenizer has no chat template, so that it answers /v1/completions alone")
            # transformers answers such a chat with an internal error
            self._chat_handler.handle_request = self._response_handler.handle_request = _refuse_chat
        # transformers lists the models in the hub's cache, and fails where there is none
        self._model_manager.get_gen_models = self._served
        self.server.run()

    def _served(self) -> list[dict[str, Any]]:
        """The only model that requests may name, in the form of OpenAI's API."""
        name = self._model_manager.force_model
        return [{"id": name, "object": "model", "owned_by": "", "created": 0}]


async def _refuse_chat(*_: Any) -> None:
    from fastapi import HTTPException  # comes with the extra `serve`

    raise HTTPException(400, "The model's tokenizer has no chat template: use /v1/completions.")
