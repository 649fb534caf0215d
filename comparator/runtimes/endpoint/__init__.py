"""Columns executed by a server with OpenAI's API, over HTTP."""

from comparator.runtimes.endpoint.runtime import EndpointRuntime

__all__ = ["EndpointRuntime"]
