"""Run by test_clients.py in a process of its own: what openai's client reads, as JSON to stdout."""

import json
import sys


def main(url: str, peers: str) -> None:
    sys.path.append(peers)
    import openai

    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    plain: dict = {"model": "tiny", "prompt": "def", "max_tokens": 9, "temperature": 0}
    chat: dict = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 9, "temperature": 0}
    chat |= {"logprobs": True, "top_logprobs": 2, "reasoning_effort": "none"}
    found: dict = {"completion": client.completions.create(**plain).choices[0].text}
    found["streamed"] = "".join(chunk.choices[0].text for chunk in client.completions.create(**plain, stream=True))
    answer = client.chat.completions.create(**chat, extra_body={"return_token_ids": True})
    found["chat"] = answer.choices[0].message.content
    found["usage"] = answer.usage.model_dump(exclude_none=True)
    found["logprobs"] = len(answer.choices[0].logprobs.content)
    found["ids"] = len(answer.choices[0].token_ids)
    chunks = client.chat.completions.create(**chat, stream=True)
    found["chat_streamed"] = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    found["models"] = [model.id for model in client.models.list()]
    found["errors"] = []
    for wrong in ({"temperature": -1}, {"model": "other"}, {"prompt": []}):
        try:
            client.completions.create(**plain | wrong)
        except openai.APIStatusError as error:
            found["errors"].append(f"{type(error).__name__}: {error.param}")
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
