"""The names of the ways in which models write calls of tools, and their reasoning."""

from __future__ import annotations

AUTO, NONE, HARMONY = "auto", "none", "harmony"

TOOL_FORMATS = (
    *(AUTO, NONE, HARMONY, "deepseek", "kimi", "mistral", "glm", "qwen3-coder", "granite"),
    *("hermes", "pythonic", "llama3"),
)
REASONING_FORMATS = (AUTO, NONE, HARMONY, "mistral", "think")
