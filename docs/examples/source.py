"""A source of negatives (see docs/bootstrapping.md): `bpo bootstrap --bootstrap.plugin docs/examples/source.py`."""

from dataclasses import replace

from bpo.bootstrap.plugin import ImageAnswers, register_source
from bpo.records import ContentPart

INSTRUCTION = ContentPart("text", " Also name what is often seen in such places.")


class Leading(ImageAnswers):
    """The model's answers to the clean image and a request that invites it to name what is not there."""

    def request(self, annotation):
        request = super().request(annotation)
        *earlier, last = request.prompt
        return replace(request, prompt=(*earlier, replace(last, content=(*last.content, INSTRUCTION))))


@register_source("leading", completion_type="mllm-leading", provenance="leading-request")  # bootstrap.sources
def leading(config, generator, candidate):
    return Leading("leading", config, generator, candidate)
