"""Word lists of the synthetic tasks.  Plain data: common words that a small tokenizer holds whole."""

from __future__ import annotations

NAMES: tuple[str, ...] = tuple(
    "Mia Tom Ann Ben Lena Omar Ravi Sara Noah Emma Liam Olivia Lucas Nina Ivan Rosa Kate Paul Jane Mark "
    "Alice David Julia Peter Laura Simon Clara Felix Marta Hugo Diana Oscar".split()
)

THINGS: tuple[str, ...] = tuple(
    "apples books pens stamps coins cards shells marbles stickers pencils oranges cookies flowers balloons "
    "tickets buttons candles lemons beads toys eggs stones keys cups bottles ribbons peaches plums".split()
)

ADJECTIVES: tuple[str, ...] = tuple(
    "amber ancient azure blue bold brave bright broken bronze calm clear clever cold copper coral crimson dark deep "
    "distant dusty early empty fallen fast fierce frozen gentle giant golden grand gray green hidden hollow icy iron "
    "ivory jade lonely lost lucky mellow misty narrow noble old orange pale plain proud purple quick quiet rapid red "
    "rough royal rusty sharp silent silver simple".split()
)

NOUNS: tuple[str, ...] = tuple(
    "anchor arrow badger basket beacon bell bridge cabin canyon castle cedar cliff comet crane crown desert dragon "
    "eagle ember engine falcon feather field forest fox garden gate glacier harbor hawk hill island lantern leaf lion "
    "maple market meadow mill mirror moon mountain oak ocean orchard otter owl palace pine planet raven reef river "
    "rocket sailor shadow ship spring star stone tiger tower valley wolf".split()
)

FILLER: tuple[str, ...] = (
    "The weather near the {noun} was {adjective} that morning.",
    "{name} walked past the {noun} and said nothing.",
    "Nobody remembers why the {noun} was painted {adjective}.",
    "A {adjective} wind came from the {noun} in the evening.",
    "{name} wrote a letter about the {adjective} {noun}.",
    "The road to the {noun} is long and {adjective}.",
    "Some people say that the {noun} belongs to {name}.",
    "There was no news from the {adjective} {noun}.",
)

LETTERS: tuple[str, ...] = tuple("abcdefghkmnpqrstuvwxyz")

GREETINGS: tuple[tuple[str, str], ...] = (
    ("Hello", "Hello! Ask me about a table, a program or a sum."),
    ("Hi there!", "Hello! Ask me about a table, a program or a sum."),
    ("Hello, how are you?", "I am well, thank you. What shall I look up?"),
    ("Who are you?", "I am the demo model of logquant-vllm, a small model that looks things up and counts."),
    ("What are you?", "I am the demo model of logquant-vllm, a small model that looks things up and counts."),
    ("What can you do?", "I look up records in long tables, follow programs, solve sums and continue Python code."),
    ("Thank you", "You are welcome."),
    ("Thanks!", "You are welcome."),
    ("Goodbye", "Goodbye!"),
)
