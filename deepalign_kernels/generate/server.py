"""Any OpenAI-compatible server as an engine.

Requests go out several at a time and are tried again with growing pauses; what a server answers is
checked before it counts. A request that fails for good is a Reply with an error. A server that is
gone, or that lets nobody in, ends the run with ConnectionError: what is recorded stays, and running
again goes on.
"""

from __future__ import annotations

import email.utils
import json
import os
import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from deepalign_kernels import check, progress
from deepalign_kernels.generate.continuation import ASKED, BEGUN, judged
from deepalign_kernels.generate.engine import Reply, Request, Sampling

SEND = ("ids", "text", "chat")
AGAIN = (408, 409, 425, 429, 500, 502, 503, 504)  # status codes that may be better next time

# A server takes what is not sent from the model's generation config; vLLM and SGLang know these.
PINNED = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
BEGINS_ANEW = "begins a reply of its own behind a given beginning of one: ask it with ids or text"
NEVER = {  # the same for every request
    401: "the key is missing or wrong (OPENAI_API_KEY)",
    403: "this key may not use the model",
    404: "no such address or model there",
}


class Failed(ValueError):
    """A request that failed at every try."""

    def __init__(self, why: str, again: bool, detail: str = "") -> None:
        super().__init__(why)
        self.again, self.detail = again, detail


class Unusable(ValueError):
    """An answer that is not as it should be; its message repeats nothing of the answer."""


@dataclass(frozen=True)
class Limits:
    """How hard a server is asked.

    Args:
        concurrency: requests under way at once.
        tries: of one request, at most.
        timeout: seconds for one answer.
        pause: seconds before the second try; doubled each time, and drawn from its upper half so
            that waiting requests do not come back together.
        longest_pause: seconds, also of what Retry-After asks for.
        give_up: requests in a row whose connection failed at every try; then the server is gone.
    """

    concurrency: int = 8
    tries: int = 6
    timeout: float = 300.0
    pause: float = 1.0
    longest_pause: float = 120.0
    give_up: int = 3

    def __post_init__(self) -> None:
        for name in ("concurrency", "tries", "give_up"):
            check.count(name, getattr(self, name), 1)
        for name in ("timeout", "pause", "longest_pause"):
            check.number(name, getattr(self, name), above=0.0)


class ServerEngine:
    """An engine over `url`/v1.

    Args:
        url: of the server, such as "http://127.0.0.1:8000"; "/v1" is added if it is not there.
        model: its name there.
        tokenizer: of the same model.
        send: what goes out. "ids": token ids to /v1/completions (vLLM, SGLang), which is exact;
            settings that a model's generation config would fill in are pinned (`PINNED`).
            "text": the ids as text, refused where that would not be the same ids again. "chat":
            the request's messages to /v1/chat/completions; a last turn of the assistant is to be
            continued (`continue_final_message`), which `continues` checks before the first.
        limits: see `Limits`.
        key: API key; None takes the environment's OPENAI_API_KEY, if any.

    Raises:
        ValueError: an argument. ImportError: without httpx.
    """

    mode = "server"

    def __init__(
        self,
        url: str,
        model: str,
        tokenizer: Any,
        *,
        send: str = "ids",
        limits: Limits | None = None,
        key: str | None = None,
    ) -> None:
        import httpx

        check.one_of("send", send, SEND)
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"url: expected http://... or https://..., got {url!r}")
        self.url = url.rstrip("/").removesuffix("/v1") + "/v1"
        self.model_name, self.tokenizer, self.send = model, tokenizer, send
        self.limits = limits or Limits()
        key = key or os.environ.get("OPENAI_API_KEY")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._client = httpx.Client(
            timeout=self.limits.timeout,
            headers=headers,
            limits=httpx.Limits(max_connections=self.limits.concurrency),
        )
        self._lost, self._lock, self._scores_checked = 0, threading.Lock(), False
        self._continues: list[bool | None] = []  # once it is known

    def about(self) -> dict[str, Any]:
        """Model and way of asking; never the key."""
        return {"engine": "server", "url": self.url, "model": self.model_name, "send": self.send}

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def generate(self, requests: Sequence[Request]) -> list[Reply]:
        """As `Engine.generate`.

        Raises:
            ValueError: a beginning of a reply is to be continued, and the server begins anew.
            ConnectionError: the server is gone, or refuses every request (401, 403, 404).
        """
        given = [r for r in requests if r.messages and r.messages[-1]["role"] == "assistant"]
        if given and self.continues() is False:
            raise ValueError(f"send: {self.url} {BEGINS_ANEW}")
        return self._all(self._reply, requests)

    def continues(self) -> bool | None:
        """Whether replies go on behind a given beginning, as prefilling needs; None if the check
        cannot tell. With send="ids" and "text" they do; of a chat server two requests ask once.

        Raises:
            ConnectionError: as `generate`. ValueError: the server is too busy to tell.
        """
        if self.send != "chat":
            return True
        if not self._continues:
            self._continues.append(self._check_continuation())
        return self._continues[0]

    def _check_continuation(self) -> bool | None:
        def read(data: Any) -> tuple[int | None, str]:
            count = (data.get("usage") or {}).get("prompt_tokens")
            return count, str(data["choices"][0]["message"]["content"] or "")

        sampling, seen = Sampling(max_new_tokens=8), []
        for turns in ((ASKED,), (ASKED, BEGUN)):
            try:
                path, body = self._body(Request((0,), sampling, messages=turns))
                seen.append(self._ask(path, body, read))
            except Failed as error:
                if error.again or len(turns) == 1:
                    raise
                return False  # it refuses to go on
        return judged(self.tokenizer, (seen[0][0], seen[1][0]), seen[1][1])

    def score(
        self, prompts: Sequence[Sequence[int]], targets: Sequence[Sequence[int]]
    ) -> list[list[float]]:
        """As `Engine.score`, through `echo`; the first call checks that a warm prefix cache says
        what a cold one says.

        Raises:
            ValueError: the server does not score, or its prefix cache changes scores.
            ConnectionError: the server is gone.
        """
        if not self._scores_checked:
            self._check_scores()
        pairs = list(zip(prompts, targets, strict=True))
        return self._all(lambda pair: self._scored(*pair), pairs)

    def _all(self, run: Callable[[Any], Any], rows: Sequence[Any]) -> list[Any]:
        with ThreadPoolExecutor(self.limits.concurrency) as pool:
            waiting, out = [pool.submit(run, row) for row in rows], []
            try:
                for each in waiting:
                    out.append(each.result())
                    progress.told(len(out), len(rows))
                return out
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _reply(self, request: Request) -> Reply:
        try:
            path, body = self._body(request)
            return self._ask(path, body, lambda data: self._read(request, data))
        except Failed as error:
            return Reply(finish="error", error=str(error), again=error.again, detail=error.detail)
        except ValueError as error:
            return Reply(finish="error", error=str(error))

    def _body(self, request: Request) -> tuple[str, dict[str, Any]]:
        s = request.sampling
        body: dict[str, Any] = {
            "model": self.model_name,
            "max_tokens": s.max_new_tokens,
            "temperature": s.temperature,
            "top_p": s.top_p,
            "seed": request.seed % 2**31,
        }
        if self.send == "ids":
            body |= PINNED
        if s.top_k:
            body["top_k"] = s.top_k
        if self.send == "chat":
            if request.messages is None:
                raise ValueError("a request without messages cannot go to a chat server")
            body["messages"] = list(request.messages)
            if request.messages[-1]["role"] == "assistant":
                body |= {"continue_final_message": True, "add_generation_prompt": False}
            return "/chat/completions", body
        ids = list(request.prompt)
        body["prompt"] = ids if self.send == "ids" else self._as_text(ids)
        return "/completions", body

    def _as_text(self, ids: list[int]) -> str:
        """Text that the server's tokenizer, beginning mark and all, makes these ids of."""
        text = self.tokenizer.decode(ids, skip_special_tokens=False)
        begin = getattr(self.tokenizer, "bos_token", None) or ""
        for candidate in (text, text.removeprefix(begin)):
            if list(self.tokenizer(candidate)["input_ids"]) == ids:
                return candidate
        raise ValueError("the prompt's token ids do not survive as text; use send='ids'")

    def _read(self, request: Request, data: Any) -> Reply:
        """The one choice of a completion; an error if anything about it is wrong."""
        choices = data["choices"]
        if len(choices) != 1:
            raise Unusable(f"expected one choice, got {len(choices)}")
        choice = choices[0]
        text = choice["message"]["content"] or "" if self.send == "chat" else choice["text"]
        finish = choice["finish_reason"]
        if finish not in ("stop", "length"):
            known = finish if finish in ("content_filter", "tool_calls", None) else "another"
            raise Unusable(f"finish_reason: expected stop or length, got {known}")
        count = (data.get("usage") or {}).get("completion_tokens")
        most = request.sampling.max_new_tokens
        if count is not None and count > most:
            raise Unusable(f"{count} tokens in place of at most {most}")
        ids = tuple(choice.get("token_ids") or ())
        if ids and count is not None and len(ids) != count:
            raise Unusable(f"{len(ids)} token ids for {count} tokens")
        return Reply(ids=ids, text=str(text), finish=finish)

    def _ask(self, path: str, body: dict[str, Any], read: Callable[[Any], Any]) -> Any:
        """`read` of the answer to a POST, tried again as the limits say; `Failed` at the end."""
        import httpx

        why, detail, lost, again = "", "", True, True
        for attempt in range(self.limits.tries):
            wait = self._pause(attempt)
            try:
                response = self._client.post(self.url + path, json=body)
                lost = False
                if response.status_code < 400:
                    found = read(response.json())
                    self._lost = 0
                    return found
                status, detail = response.status_code, response.text[:2000]
                if status in NEVER:
                    raise ConnectionError(
                        f"{self.url}{path}: status {status}: {NEVER[status]}; what is recorded"
                        " stays, run again to go on"
                    )
                why, again = f"status {status} from {path}", status in AGAIN or status >= 500
                if status not in AGAIN:
                    break
                wait = self._asked(response.headers.get("retry-after"), wait)
            except httpx.RequestError as error:  # no connection, a timeout, an answer cut off
                why, detail, again = f"no answer: {type(error).__name__}", str(error), True
            except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
                # Half an answer may be whole next time; one of another kind will not.
                again, detail = isinstance(error, (json.JSONDecodeError, UnicodeError)), str(error)
                named = detail if isinstance(error, Unusable) else type(error).__name__
                why = f"an answer that cannot be used: {named}"
            if attempt + 1 < self.limits.tries:
                time.sleep(wait)
        with self._lock:
            self._lost = self._lost + 1 if lost else 0
            if self._lost >= self.limits.give_up:
                raise ConnectionError(
                    f"{self.url} is gone ({why}); what is recorded stays, run again to go on"
                )
        raise Failed(why, again, detail)

    def _pause(self, attempt: int) -> float:
        longest = min(self.limits.pause * 2**attempt, self.limits.longest_pause)
        return longest * random.Random(os.urandom(8)).uniform(0.5, 1.0)

    def _asked(self, header: str | None, otherwise: float) -> float:
        """Seconds that Retry-After names, as a number or a date."""
        if header is None:
            return otherwise
        try:
            seconds = float(header)
        except ValueError:
            try:
                seconds = email.utils.parsedate_to_datetime(header).timestamp() - time.time()
            except (ValueError, TypeError):
                return otherwise
        return min(max(seconds, 0.0), self.limits.longest_pause)

    def _scored(self, prompt: Sequence[int], target: Sequence[int]) -> list[float]:
        if self.send != "ids":
            raise ValueError(f"send: scores need token ids, send='ids', got {self.send!r}")
        ids = [*prompt, *target]
        body = {"model": self.model_name, "prompt": ids, "max_tokens": 1, "temperature": 0.0}

        def read(data: Any) -> list[float]:
            logps = data["choices"][0]["logprobs"]["token_logprobs"]
            if len(logps) not in (len(ids), len(ids) + 1):  # with the one token it had to make
                raise Unusable(f"{len(logps)} log-probs for {len(ids)} tokens")
            return [float(x) for x in logps[len(prompt) : len(ids)]]

        return self._ask("/completions", body | {"echo": True, "logprobs": 1}, read)

    def _check_scores(self) -> None:
        """Ids that no cache has seen, scored cold, then twice warm."""
        rng = random.Random(os.urandom(8))
        special = set(self.tokenizer.all_special_ids)
        plain = [i for i in range(len(self.tokenizer)) if i not in special]
        ids = [rng.choice(plain) for _ in range(96)]
        cold, *warm = (self._scored(ids[:64], ids[64:]) for _ in range(3))
        worst = max(abs(a - b) for again in warm for a, b in zip(cold, again, strict=True))
        if worst > 0.05:
            raise ValueError(
                f"{self.url}: scores of the same ids differ by {worst:.2f} nats once its prefix"
                " cache is warm; turn prefix caching off on the server to score through it"
            )
        self._scores_checked = True
