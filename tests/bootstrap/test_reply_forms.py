"""Forms of questions and replies."""

from __future__ import annotations

import pytest

from bpo.bootstrap.reply_forms import asks_for_description, expects_yes_or_no, is_refusal, yes_or_no


@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry, but I can't assist with that.",
        "I’m sorry, but there is no image.",
        "Sorry, I cannot help with this image.",
        "I apologize, but I am unable to see it.",
        "As an AI language model, I do not have eyes.",
        "As an AI, I can only guess.",
        "I cannot see the image.",
        "I don't see any image here.",
        "Unfortunately, I am unable to view pictures.",
        "I don’t have access to the photo.",
        "I can't determine the colour of the car.",
        "It is not possible to determine the time of day.",
        "No image was provided.",
        "Please provide the image.",
        "The picture is dark. I'm sorry, I cannot say more.",
        '"I am just a language model."',
        "Es tut mir leid, das Bild ist leer.",
        "Ich kann das Bild leider nicht sehen.",
        "Ich bin eine KI und sehe nichts.",
        "Désolé, je ne vois rien.",
        "Je ne peux pas voir l'image.",
        "Lo siento, no puedo ver la imagen.",
        "Mi dispiace, non posso.",
        "Desculpe, não consigo ver a imagem.",
        "Het spijt me, ik kan het beeld niet zien.",
        "Przepraszam, ale nie mogę.",
        "Извините, я не вижу изображения.",
        "抱歉，我无法查看图片。",
        "作为一个人工智能，我没有眼睛。",
        "申し訳ありませんが、画像を確認できません。",
        "죄송하지만 이미지를 볼 수 없습니다.",
        "عذرًا، لا أستطيع رؤية الصورة.",
    ],
)
def test_refusals_of_many_languages_are_recognised(text: str) -> None:
    assert is_refusal(text)


@pytest.mark.parametrize(
    "text",
    [
        "A cat sits on a mat.",
        "Sorry, we are closed.",
        "I can't see any birds.",
        "No, I do not see a dog.",
        "There is no picture on the wall.",
        "As an airplane lands, a man waves.",
        "As a man walks by, a dog barks.",
        "A sign says: I'm sorry.",
        "The man is unable to open the door.",
        "One. Two. I'm sorry, but I cannot go on.",  # only the beginning decides
        "Ein Hund kann nicht sehen.",
        "Como se ve, hay un perro.",
        "我看到一只狗。",
        "",
    ],
)
def test_ordinary_answers_are_not_refusals(text: str) -> None:
    assert not is_refusal(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Yes", (True, "")),
        ("no.", (False, ".")),
        ("Yes, it is.", (True, ", it is.")),
        ("Yes there is", (True, " there is")),
        ("No - there are none", (False, " - there are none")),
        ("Nein, er ist blau.", (False, ", er ist blau.")),
        ("Sí, hay dos.", (True, ", hay dos.")),
        ("是的，有一只狗", (True, "，有一只狗")),
        ("いいえ。", (False, "。")),
        ("No people are in the room.", None),
        ("No-one is there.", None),
        ("Norway", None),
        ("是一只狗", None),
        ("The man says no.", None),
    ],
)
def test_answers_that_begin_with_yes_or_no(text: str, expected: tuple[bool, str] | None) -> None:
    assert yes_or_no(text) == expected


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("Is it raining?", True),
        ("In the image, are there any dogs?", True),
        ("Isn't the door open?", True),
        ("Is there a dog? Answer yes or no.", True),
        ("What does the sign say? Answer yes or no.", True),
        ("Is the door open or closed?", False),
        ("What colour is the car?", False),
        ("Can you tell me the time?", False),
        ("Describe the image.", False),
        ("¿Hay un perro?", None),
        ("", None),
    ],
)
def test_questions_that_are_answered_by_yes_or_no(question: str, expected: bool | None) -> None:
    assert expects_yes_or_no(question) is expected


def test_requests_for_a_description() -> None:
    assert asks_for_description("Give a short caption.") and not asks_for_description("How many dogs are there?")
