"""SGLang's HTTP application for the processes of several tokenizer workers.

They import the application that ``SGLANG_HTTP_SERVER_APP_PATH`` names, and load no plugins by themselves.
The plugin has them import this one, which does so first.
"""

from sglang.srt.plugins import load_plugins

load_plugins()

from sglang.srt.entrypoints.http_server import app  # noqa: E402 - with the plugins loaded

__all__ = ["app"]
