"""vLLM's own OpenAI routes on an engine: /v1/models, /v1/completions and /v1/chat/completions."""

from __future__ import annotations

import importlib
import logging
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

from slipstream.vllm_compat import load

logger = logging.getLogger(__name__)


def app(engine: Any) -> Any:
    """An ASGI app with the routes, for the engine's served model name.

    Where this vLLM's classes are not those that are known, every route answers 501 with the reason.
    """
    try:
        return _app(engine)
    except (ImportError, TypeError, AttributeError) as error:
        reason = f"vLLM {load().__version__} has other classes for the OpenAI routes than are known: {error}"
        logger.warning("%s", reason)
        return _Missing(reason)


def _app(engine: Any) -> Any:
    from fastapi import FastAPI
    from vllm.entrypoints.openai.chat_completion import api_router as chat
    from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
    from vllm.entrypoints.openai.completion import api_router as completion
    from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
    from vllm.entrypoints.openai.models import api_router as models
    from vllm.entrypoints.openai.models.protocol import BaseModelPath
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels
    from vllm.renderers.online_renderer import OnlineRenderer

    config = engine.model_config
    template: dict[str, Any] = {"chat_template": None, "chat_template_content_format": "auto"}
    served = OpenAIServingModels(engine, [BaseModelPath(name=config.served_model_name, model_path=config.model)])
    renderer = OnlineRenderer(config, engine.renderer, request_logger=None, **template)
    made = FastAPI(openapi_url=None)
    made.state.openai_serving_models = served
    made.state.openai_serving_completion = OpenAIServingCompletion(
        engine, served, online_renderer=renderer, request_logger=None
    )
    made.state.openai_serving_chat = OpenAIServingChat(
        engine, served, "assistant", online_renderer=renderer, request_logger=None, **template
    )
    made.state.openai_serving_chat_batch = None
    # What vLLM's routes and error handlers look up; the replica itself watches whether the engine lives.
    made.state.engine_client = engine
    made.state.args = SimpleNamespace(log_error_stack=False, sse_keep_alive_interval=0)
    made.state.server = SimpleNamespace(should_exit=False)
    _handle_errors(made)
    for module in (models, completion, chat):
        made.include_router(module.router)
    return made


def _handle_errors(made: Any) -> None:
    """Let errors be answered as vLLM's own server answers them."""
    if find_spec("vllm.entrypoints.serve.exception_handling") is not None:
        from vllm.entrypoints.serve.exception_handling.register import init_exception_handler

        init_exception_handler(made)
        return
    # vLLM 0.26 and 0.27 have the handlers, and register them where they make the app.
    from fastapi import HTTPException
    from fastapi.exceptions import RequestValidationError

    handlers = importlib.import_module("vllm.entrypoints.serve.utils.server_utils")
    made.exception_handler(HTTPException)(handlers.http_exception_handler)
    made.exception_handler(RequestValidationError)(handlers.validation_exception_handler)
    made.exception_handler(Exception)(handlers.exception_handler)
    for kind in (ValueError, TypeError, OverflowError, NotImplementedError):
        made.exception_handler(kind)(handlers.exception_handler)
    known = importlib.import_module("vllm.exceptions")
    if hasattr(handlers, "vllm_error_handler"):  # 0.27
        made.exception_handler(known.VLLMError)(handlers.vllm_error_handler)
        return
    made.exception_handler(known.VLLMNotFoundError)(handlers.exception_handler)  # its others are ValueErrors
    exceptions = importlib.import_module("vllm.v1.engine.exceptions")
    for kind in (exceptions.EngineGenerateError, exceptions.EngineDeadError):
        made.exception_handler(kind)(handlers.engine_error_handler)
    protocol = importlib.import_module("vllm.entrypoints.openai.engine.protocol")
    made.exception_handler(protocol.GenerationError)(handlers.generation_error_handler)


class _Missing:
    """An ASGI app that answers every request with 501."""

    def __init__(self, reason: str) -> None:
        self._reason = reason

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        from starlette.responses import JSONResponse

        await JSONResponse({"detail": self._reason}, 501)(scope, receive, send)
