"""What a script pays before its first answer."""

from __future__ import annotations

from clients import OURS
from figure import Figure, Goal, Job, Measure

IMPORTS = {
    OURS: ("import LLM", "from LLM import LLM, LLMConfig"),
    "http.client": ("import http.client", "import http.client, json"),
    "urllib3": ("import urllib3", "from urllib3 import PoolManager"),
    "requests": ("import requests", "from requests import Session"),
    "httpx": ("import httpx", "from httpx import Client"),
    "openai": ("import openai", "from openai import OpenAI"),
    "anthropic": ("import anthropic", "from anthropic import Anthropic"),
    "litellm": ("import litellm", "from litellm import completion"),
    "ollama": ("import ollama", "from ollama import Client"),
}

MESSAGES = '[{"role": "user", "content": "hi"}]'
REST = f"""{{"model": "gpt-4", "messages": {MESSAGES}}}"""
SCRIPTS = {
    OURS: f"""
from LLM import LLM, LLMConfig
with LLM(LLMConfig(base_url=URL + "/v1", model="gpt-4", api_key="sk-test")) as llm:
    print(llm.chat_completion({MESSAGES}).choices[0].message.content)
""",
    "http.client": f"""
import http.client, json
host, _, path = URL.removeprefix("http://").partition("/")
connection = http.client.HTTPConnection(host, timeout=30)
headers = {{"Authorization": "Bearer sk-test", "Content-Type": "application/json"}}
connection.request("POST", f"/{{path}}/v1/chat/completions", json.dumps({REST}), headers)
print(json.loads(connection.getresponse().read())["choices"][0]["message"]["content"])
""",
    "urllib3": f"""
import json, urllib3
headers = {{"Authorization": "Bearer sk-test"}}
URL += "/v1/chat/completions"
answer = urllib3.PoolManager().request("POST", URL, json={REST}, headers=headers)
print(answer.json()["choices"][0]["message"]["content"])
""",
    "requests": f"""
import requests
with requests.Session() as session:
    headers = {{"Authorization": "Bearer sk-test"}}
    answer = session.post(URL + "/v1/chat/completions", json={REST}, headers=headers, timeout=30)
    print(answer.json()["choices"][0]["message"]["content"])
""",
    "httpx": f"""
import httpx
with httpx.Client(headers={{"Authorization": "Bearer sk-test"}}) as client:
    answer = client.post(URL + "/v1/chat/completions", json={REST})
    print(answer.json()["choices"][0]["message"]["content"])
""",
    "openai": f"""
from openai import OpenAI
with OpenAI(base_url=URL + "/v1", api_key="sk-test") as client:
    answer = client.chat.completions.create(model="gpt-4", messages={MESSAGES})
    print(answer.choices[0].message.content)
""",
    "anthropic": f"""
from anthropic import Anthropic
with Anthropic(base_url=URL, api_key="sk-test") as client:
    model = "claude-3-5-sonnet-20241022"
    answer = client.messages.create(model=model, max_tokens=99, messages={MESSAGES})
    print(answer.content[0].text)
""",
    "litellm": f"""
from litellm import completion
answer = completion("openai/gpt-4", {MESSAGES}, api_base=URL + "/v1", api_key="sk-test")
print(answer.choices[0].message.content)
""",
    "ollama": f"""
from ollama import Client
print(Client(host=URL).chat(model="llama2", messages={MESSAGES}).message.content)
""",
}


def imports(job: Job) -> dict[str, float]:
    plain, names = IMPORTS[job.client]
    bare = min(job.script_cpu("pass") for _ in range(2))
    return {"import": job.script_cpu(plain) - bare, "names": job.script_cpu(names) - bare}


def start(job: Job) -> dict[str, float]:
    return {"cpu": job.script_cpu(f"URL = {job.url('plain')!r}\n{SCRIPTS[job.client]}")}


FIGURES = (
    Figure(
        "import",
        "import",
        imports,
        (
            Measure("import", "`import NAME`", "ms"),
            Measure("names", "`from NAME import` the client class", "ms"),
        ),
        "CPU of a fresh interpreter that does nothing but the import, less that of one that does "
        "nothing. The second "
        "row asks for the names a script needs: names that load lazily are paid there.",
        (Goal("import", 0.030),),
        rounds=0.6,
        in_parent=True,
    ),
    Figure(
        "start",
        "start → first answer",
        start,
        (Measure("cpu", "whole script", "ms"),),
        "CPU of a whole script in a fresh interpreter: import, client, one chat completion, print, "
        "exit.",
        (Goal("cpu", 2.2, of="requests"), Goal("cpu", 1 / 5, of="openai")),
        in_parent=True,
    ),
)
