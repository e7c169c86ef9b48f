"""The templates that need no file. Each marks what the assistant generates, its end of turn included."""

from __future__ import annotations

# The prompts are those published with Stanford Alpaca (prompts.txt and train.py of its repository): the answer follows
# "### Response:" at once, and the end-of-text token follows the answer. A system message replaces the first paragraph.
_ALPACA = """\
{%- set paired = "Below is an instruction that describes a task, paired with an input that provides further context. \
Write a response that appropriately completes the request." -%}
{%- set alone = "Below is an instruction that describes a task. Write a response that appropriately completes the \
request." -%}
{%- set told = namespace(system="", asked=false) -%}
{%- for message in messages -%}
{%- if message.role == "system" -%}
{%- set told.system = message.content -%}
{%- elif message.role == "user" -%}
{%- if not told.asked -%}
{{- told.system or (paired if message.input else alone) -}}
{%- endif -%}
{%- set told.asked = true -%}
{{- "\\n\\n### Instruction:\\n" + (message.instruction if message.input else message.content) -}}
{%- if message.input -%}
{{- "\\n\\n### Input:\\n" + message.input -}}
{%- endif -%}
{{- "\\n\\n### Response:" -}}
{%- elif message.role == "assistant" -%}
{%- if not told.asked -%}
{{- raise_exception("the template alpaca begins with an instruction, and the first message is the assistant's") -}}
{%- endif -%}
{%- generation -%}{{- message.content + eos_token -}}{%- endgeneration -%}
{%- else -%}
{{- raise_exception("the template alpaca has no place for a message of " + message.role) -}}
{%- endif -%}
{%- endfor -%}
"""

_CHATML = """\
{%- for message in messages -%}
{{- "<|im_start|>" + message.role + "\\n" -}}
{%- if message.role == "assistant" -%}
{%- generation -%}{{- message.content + "<|im_end|>" -}}{%- endgeneration -%}
{%- else -%}
{{- message.content + "<|im_end|>" -}}
{%- endif -%}
{{- "\\n" -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- "<|im_start|>assistant\\n" -}}{%- endif -%}
"""

# Messages one below the other, without any name; each answer ends in the end-of-text token.
_PLAIN = """\
{%- for message in messages -%}
{%- if message.role == "assistant" -%}
{%- generation -%}{{- message.content + eos_token -}}{%- endgeneration -%}
{%- elif message.role in ("system", "user") -%}
{{- message.content + "\\n" -}}
{%- else -%}
{{- raise_exception("the template plain has no place for a message of " + message.role) -}}
{%- endif -%}
{%- endfor -%}
"""

BUILTIN = {"alpaca": _ALPACA, "chatml": _CHATML, "plain": _PLAIN}
