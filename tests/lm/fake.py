"""A language model that says what it was told to: `FakeLM({(1, 4): [7, 8]})` or `FakeLM(lambda prompt: [7, 8])`."""

from stepaudio.lm.base import Completion, StopReason, Token
from stepaudio.lm.sampling import check_room


class FakeLM:
    """Answers by the first rule whose ids the prompt ends with, `()` matches all; remembers every call.

    A script that is longer than max_new_tokens is cut (LENGTH), else it ends as if a stop id came (STOP).
    """

    def __init__(self, rules, max_context=4096):
        self.rules = rules if callable(rules) else lambda prompt: _by_ending(rules, prompt)
        self.max_context = max_context
        self.calls = []  # (prompt, params) in order

    def stream(self, prompt, params, cancelled=None):
        check_room(len(prompt), params, self.max_context)
        self.calls.append((tuple(prompt), params))
        script = [index for index in self.rules(tuple(prompt)) if index not in params.stop_ids]
        return self._play(script, params, cancelled)

    def _play(self, script, params, cancelled):
        for index in script[: params.max_new_tokens]:
            yield Token(index)
            if cancelled is not None and cancelled():
                yield Token(None, StopReason.CANCELLED)
                return
        yield Token(None, StopReason.LENGTH if len(script) >= params.max_new_tokens else StopReason.STOP)

    def generate(self, prompts, params):
        runs = [list(self.stream(prompt, wanted)) for prompt, wanted in zip(prompts, params)]
        return [Completion(tuple(token.id for token in run[:-1]), run[-1].stop) for run in runs]


def _by_ending(rules, prompt):
    for ending, ids in rules.items():
        if prompt[len(prompt) - len(ending) :] == tuple(ending):
            return ids
    raise AssertionError(f"no rule for a prompt that ends with {prompt[-8:]}")
