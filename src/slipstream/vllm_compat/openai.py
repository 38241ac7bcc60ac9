"""vLLM's own OpenAI routes on an engine: /v1/models, /v1/completions and /v1/chat/completions."""

from __future__ import annotations

import logging
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
    from vllm.entrypoints.serve.exception_handling.register import init_exception_handler
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
    init_exception_handler(made)
    for module in (models, completion, chat):
        made.include_router(module.router)
    return made


class _Missing:
    """An ASGI app that answers every request with 501."""

    def __init__(self, reason: str) -> None:
        self._reason = reason

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        from starlette.responses import JSONResponse

        await JSONResponse({"detail": self._reason}, 501)(scope, receive, send)
