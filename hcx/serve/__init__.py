"""Serving over HTTP with the OpenAI protocol."""
