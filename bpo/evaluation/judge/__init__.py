"""Language models as judges of answers: prompts, replies, and what the replies amount to."""
