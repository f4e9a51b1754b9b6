"""A describer that writes fixed texts in no time, for tests and pictures of the page."""
import re, time
from contextlib import contextmanager

from descgen.describer import Prompt
from descgen.inference import Sampling
from descgen.verified import Verified, locate_claims, verify

SOURCES = [
    {"uid": "B0017", "title": "Blue enamel mug", "content": "Enamelled steel mug in 5 colours. Holds 350 ml."},
    {"uid": "B0042", "title": "Enamel bowl", "content": "A bowl of enamelled steel, 18 cm wide."}]

class AppModel:
    "Knows which of the two models writes"
    name = "fine-tuned"

    @contextmanager
    def disable_adapter(self):
        "Write as the base within a `with` block"
        self.name = "base"
        try:
            yield
        finally:
            self.name = "fine-tuned"

class AppDescriber:
    "Describes each title with two supported sentences and one that is not"
    n_sources, trained_with_sources, max_seq_length = 2, True, 2048

    def __init__(self, seconds=0., sources=SOURCES): # between two words; the sources of each title
        self.model, self.seconds, self.sources = AppModel(), seconds, sources
        self.n_words = 0

    def sources_of(self, titles):
        return [self.sources[:self.n_sources] for _ in titles]

    def identity(self):
        return {"adapter": "fixed texts", "sources": self.n_sources}

    def prompts_of(self, titles):
        return [Prompt(own, title) for title, own in zip(titles, self.sources_of(titles))]

    def verifies(self, verify=None):
        return self.trained_with_sources if verify is None else verify

    def draft(self, title):
        if self.model.name == "base":
            return f"Introducing {title}! It comes in 5 colours. It was made in 1999."
        return f"{title}: enamelled steel with a rolled rim, in 5 colours. It weighs 340 grams."

    def finish(self, title, check):
        "The text with its claims, with unsupported sentences left out if wanted"
        sources = self.sources_of([title])[0]
        if check: return verify(self.draft(title), title, sources)
        claims = locate_claims(self.draft(title), title, sources)
        return Verified(self.draft(title), claims, sources=tuple(sources))

    def describe(self, titles, sampling=Sampling(), *, verify=None, strict=False, drafts=1, keys=None, prompts=None,
            progress=True, on_text=lambda number, verified: None):
        time.sleep(self.seconds)
        texts = [self.finish(title, verify) for title in titles]
        for number, text in enumerate(texts):
            on_text(number, text)
        return texts

    def stream(self, title, sampling=Sampling(), *, verify=None, strict=False):
        for word in re.findall(r"\S+\s*", self.draft(title)):
            time.sleep(self.seconds)
            self.n_words += 1
            yield word
        return self.finish(title, verify)
