"""
The demo's data: true facts with one short answer, and two tasks over them.

- `reading`: the fact stands in the prompt, and is asked for.
- `recalling`: the same question without the sentence; only what the model knows can help.

`python examples/facts.py` prints the counts and a few rows.
"""

import random
import re
from typing import NamedTuple


# In training, the sentence to read gives the entity another one's answer, so that the model learns to read instead of
# to remember; this many times for each wording of a question. Test rows, and all that is to be recalled, are true.
NUM_SWAPS = 2

# One entity a line. `*` marks what is widely known: only these are asked for in `recalling`, since the rest would
# measure memorising instead of knowledge. An empty column is a fact left out because its answer can be argued about.

# In the order of the atomic number.
ELEMENTS = """
*H hydrogen | *He helium | *Li lithium | Be beryllium | B boron | *C carbon | *N nitrogen | *O oxygen | *F fluorine
*Ne neon | *Na sodium | *Mg magnesium | *Al aluminum | *Si silicon | *P phosphorus | *S sulfur | *Cl chlorine
*Ar argon | *K potassium | *Ca calcium | Sc scandium | *Ti titanium | V vanadium | *Cr chromium | *Mn manganese
*Fe iron | *Co cobalt | *Ni nickel | *Cu copper | *Zn zinc | Ga gallium | Ge germanium | *As arsenic | Se selenium
*Br bromine | Kr krypton | Rb rubidium | Sr strontium | Y yttrium | Zr zirconium | Nb niobium | Mo molybdenum
Tc technetium | Ru ruthenium | Rh rhodium | Pd palladium | *Ag silver | Cd cadmium | In indium | *Sn tin
Sb antimony | Te tellurium | *I iodine | Xe xenon | Cs cesium | Ba barium | La lanthanum | Ce cerium
Pr praseodymium | Nd neodymium | Pm promethium | Sm samarium | Eu europium | Gd gadolinium | Tb terbium
Dy dysprosium | Ho holmium | Er erbium | Tm thulium | Yb ytterbium | Lu lutetium | Hf hafnium | Ta tantalum
*W tungsten | Re rhenium | Os osmium | Ir iridium | *Pt platinum | *Au gold | *Hg mercury | Tl thallium | *Pb lead
Bi bismuth | Po polonium | At astatine | Rn radon | Fr francium | *Ra radium | Ac actinium | Th thorium
Pa protactinium | *U uranium | Np neptunium | *Pu plutonium | Am americium | Cm curium | Bk berkelium
Cf californium | Es einsteinium | Fm fermium | Md mendelevium | No nobelium | Lr lawrencium | Rf rutherfordium
Db dubnium | Sg seaborgium | Bh bohrium | Hs hassium | Mt meitnerium | Ds darmstadtium | Rg roentgenium
Cn copernicium | Nh nihonium | Fl flerovium | Mc moscovium | Lv livermorium | Ts tennessine | Og oganesson
"""

# country | capital | continent | currency | main language
COUNTRIES = """
*France | Paris | Europe | euro | French
*Germany | Berlin | Europe | euro | German
*Italy | Rome | Europe | euro | Italian
*Spain | Madrid | Europe | euro | Spanish
*Portugal | Lisbon | Europe | euro | Portuguese
*Greece | Athens | Europe | euro | Greek
*Austria | Vienna | Europe | euro | German
*Belgium | Brussels | Europe | euro |
*the Netherlands | Amsterdam | Europe | euro | Dutch
*Ireland | Dublin | Europe | euro | English
*Finland | Helsinki | Europe | euro | Finnish
*Sweden | Stockholm | Europe | krona | Swedish
*Norway | Oslo | Europe | krone | Norwegian
*Denmark | Copenhagen | Europe | krone | Danish
*Iceland | Reykjavik | Europe | | Icelandic
*Switzerland | Bern | Europe | franc | German
*the United Kingdom | London | Europe | pound | English
*Poland | Warsaw | Europe | zloty | Polish
*Hungary | Budapest | Europe | forint | Hungarian
*the Czech Republic | Prague | Europe | koruna | Czech
*Romania | Bucharest | Europe | leu | Romanian
*Bulgaria | Sofia | Europe | | Bulgarian
*Ukraine | Kyiv | Europe | hryvnia | Ukrainian
*Russia | Moscow | | ruble | Russian
*Turkey | Ankara | | lira | Turkish
*Croatia | Zagreb | Europe | euro | Croatian
*Serbia | Belgrade | Europe | dinar | Serbian
Slovakia | Bratislava | Europe | euro | Slovak
Slovenia | Ljubljana | Europe | euro |
Estonia | Tallinn | Europe | euro | Estonian
Latvia | Riga | Europe | euro | Latvian
Lithuania | Vilnius | Europe | euro | Lithuanian
Albania | Tirana | Europe | lek | Albanian
Malta | Valletta | Europe | euro |
Cyprus | Nicosia | | euro |
Luxembourg | | Europe | euro |
Belarus | Minsk | Europe | ruble |
Moldova | Chisinau | Europe | leu | Romanian
Montenegro | Podgorica | Europe | euro |
North Macedonia | Skopje | Europe | denar | Macedonian
Bosnia and Herzegovina | Sarajevo | Europe | |
Andorra | Andorra la Vella | Europe | euro |
Liechtenstein | Vaduz | Europe | franc | German
*China | Beijing | Asia | yuan | Chinese
*Japan | Tokyo | Asia | yen | Japanese
*South Korea | Seoul | Asia | won | Korean
*North Korea | Pyongyang | Asia | won | Korean
*India | New Delhi | Asia | rupee |
*Pakistan | Islamabad | Asia | rupee |
*Nepal | Kathmandu | Asia | rupee | Nepali
*Bangladesh | Dhaka | Asia | taka | Bengali
*Thailand | Bangkok | Asia | baht | Thai
*Vietnam | Hanoi | Asia | dong | Vietnamese
*the Philippines | Manila | Asia | peso |
*Malaysia | Kuala Lumpur | Asia | ringgit | Malay
*Indonesia | | Asia | rupiah | Indonesian
*Iran | Tehran | Asia | rial | Persian
*Iraq | Baghdad | Asia | dinar | Arabic
*Saudi Arabia | Riyadh | Asia | riyal | Arabic
*Syria | Damascus | Asia | pound | Arabic
*Lebanon | Beirut | Asia | pound | Arabic
*Jordan | Amman | Asia | dinar | Arabic
*Afghanistan | Kabul | Asia | afghani |
*Qatar | Doha | Asia | riyal |
*Mongolia | Ulaanbaatar | Asia | tugrik | Mongolian
Kuwait | Kuwait City | Asia | dinar |
Oman | Muscat | Asia | rial | Arabic
Bahrain | Manama | Asia | dinar |
Cambodia | Phnom Penh | Asia | riel | Khmer
Laos | Vientiane | Asia | kip | Lao
Myanmar | Naypyidaw | Asia | kyat | Burmese
Bhutan | Thimphu | Asia | ngultrum |
the Maldives | Malé | Asia | rufiyaa | Dhivehi
Brunei | Bandar Seri Begawan | Asia | dollar | Malay
Uzbekistan | Tashkent | Asia | som | Uzbek
Turkmenistan | Ashgabat | Asia | manat | Turkmen
Tajikistan | Dushanbe | Asia | somoni | Tajik
Kyrgyzstan | Bishkek | Asia | som | Kyrgyz
Kazakhstan | Astana | | tenge |
Azerbaijan | Baku | | manat | Azerbaijani
Armenia | Yerevan | | dram | Armenian
*Egypt | Cairo | Africa | pound | Arabic
*Morocco | Rabat | Africa | dirham |
*Algeria | Algiers | Africa | dinar |
*Tunisia | Tunis | Africa | dinar | Arabic
*Libya | Tripoli | Africa | dinar | Arabic
*Nigeria | Abuja | Africa | naira |
*Kenya | Nairobi | Africa | shilling |
*Ethiopia | Addis Ababa | Africa | birr |
*Ghana | Accra | Africa | cedi |
*Sudan | Khartoum | Africa | pound | Arabic
*South Africa | | Africa | rand |
*Uganda | Kampala | Africa | shilling |
*Zimbabwe | Harare | Africa | |
*Somalia | Mogadishu | Africa | shilling | Somali
*Senegal | Dakar | Africa | franc |
*Angola | Luanda | Africa | kwanza | Portuguese
Tanzania | Dodoma | Africa | shilling | Swahili
Rwanda | Kigali | Africa | franc | Kinyarwanda
Zambia | Lusaka | Africa | kwacha |
Malawi | Lilongwe | Africa | kwacha |
Mozambique | Maputo | Africa | metical |
Namibia | Windhoek | Africa | dollar |
Botswana | Gaborone | Africa | pula |
Lesotho | Maseru | Africa | loti | Sesotho
Madagascar | Antananarivo | Africa | ariary | Malagasy
Mali | Bamako | Africa | franc |
Niger | Niamey | Africa | franc |
Chad | N'Djamena | Africa | franc |
Burkina Faso | Ouagadougou | Africa | franc |
Ivory Coast | Yamoussoukro | Africa | franc |
Cameroon | Yaoundé | Africa | franc |
Gabon | Libreville | Africa | franc | French
Togo | Lomé | Africa | franc |
Liberia | Monrovia | Africa | dollar | English
Sierra Leone | Freetown | Africa | leone |
the Gambia | Banjul | Africa | dalasi |
Mauritania | Nouakchott | Africa | ouguiya | Arabic
Eritrea | Asmara | Africa | nakfa |
Mauritius | Port Louis | Africa | rupee |
Seychelles | Victoria | Africa | rupee |
Cape Verde | Praia | Africa | escudo |
*Canada | Ottawa | North America | dollar |
*the United States | | North America | dollar | English
*Mexico | Mexico City | North America | peso | Spanish
*Cuba | Havana | North America | peso | Spanish
*Jamaica | Kingston | North America | dollar |
*Haiti | Port-au-Prince | North America | gourde |
*Guatemala | Guatemala City | North America | quetzal | Spanish
*Costa Rica | San José | North America | colón | Spanish
*Panama | Panama City | North America | | Spanish
*Honduras | Tegucigalpa | North America | lempira | Spanish
*Nicaragua | Managua | North America | | Spanish
El Salvador | San Salvador | North America | | Spanish
the Dominican Republic | Santo Domingo | North America | peso | Spanish
the Bahamas | Nassau | North America | dollar | English
Barbados | Bridgetown | North America | dollar | English
Belize | Belmopan | North America | dollar | English
Trinidad and Tobago | Port of Spain | North America | dollar | English
*Brazil | Brasília | South America | real | Portuguese
*Argentina | Buenos Aires | South America | peso | Spanish
*Chile | Santiago | South America | peso | Spanish
*Peru | Lima | South America | sol | Spanish
*Colombia | Bogotá | South America | peso | Spanish
*Venezuela | Caracas | South America | bolívar | Spanish
*Ecuador | Quito | South America | dollar | Spanish
*Uruguay | Montevideo | South America | peso | Spanish
*Paraguay | Asunción | South America | guaraní |
Guyana | Georgetown | South America | dollar | English
Suriname | Paramaribo | South America | dollar | Dutch
*Australia | Canberra | | dollar | English
*New Zealand | Wellington | | dollar | English
*Fiji | Suva | | dollar |
Papua New Guinea | Port Moresby | | kina |
Samoa | Apia | | tala | Samoan
Tonga | Nuku'alofa | | | Tongan
Vanuatu | Port Vila | | vatu |
"""

# U.S. state | capital
STATES = """
*Alabama | Montgomery
*Alaska | Juneau
*Arizona | Phoenix
*Arkansas | Little Rock
*California | Sacramento
*Colorado | Denver
*Connecticut | Hartford
*Delaware | Dover
*Florida | Tallahassee
*Georgia | Atlanta
*Hawaii | Honolulu
*Idaho | Boise
*Illinois | Springfield
*Indiana | Indianapolis
*Iowa | Des Moines
*Kansas | Topeka
*Kentucky | Frankfort
*Louisiana | Baton Rouge
*Maine | Augusta
*Maryland | Annapolis
*Massachusetts | Boston
*Michigan | Lansing
*Minnesota | Saint Paul
*Mississippi | Jackson
*Missouri | Jefferson City
*Montana | Helena
*Nebraska | Lincoln
*Nevada | Carson City
*New Hampshire | Concord
*New Jersey | Trenton
*New Mexico | Santa Fe
*New York | Albany
*North Carolina | Raleigh
*North Dakota | Bismarck
*Ohio | Columbus
*Oklahoma | Oklahoma City
*Oregon | Salem
*Pennsylvania | Harrisburg
*Rhode Island | Providence
*South Carolina | Columbia
*South Dakota | Pierre
*Tennessee | Nashville
*Texas | Austin
*Utah | Salt Lake City
*Vermont | Montpelier
*Virginia | Richmond
*Washington | Olympia
*West Virginia | Charleston
*Wisconsin | Madison
*Wyoming | Cheyenne
"""

# class: members
ANIMALS = """
mammals: *dogs, *cats, *horses, *lions, *elephants, *whales, *dolphins, *bats, *mice, *rabbits, *kangaroos, *bears
birds: *eagles, *penguins, *owls, *ducks, *parrots, *ostriches, *sparrows, *swans, *crows, *flamingos, herons, puffins
reptiles: *snakes, *lizards, *turtles, *crocodiles, *alligators, *tortoises, *iguanas, *geckos, *chameleons, skinks
amphibians: *frogs, *toads, *salamanders, *newts, axolotls, caecilians
fish: *sharks, *salmon, *tuna, *trout, *cod, *goldfish, *eels, *seahorses, *stingrays, carp, herrings
insects: *ants, *bees, *butterflies, *beetles, *flies, *mosquitoes, *moths, *wasps, *grasshoppers, *termites
"""

# animal | its young
YOUNG = """
*dog | puppy
*cat | kitten
*cow | calf
*horse | foal
*sheep | lamb
*goat | kid
*pig | piglet
*chicken | chick
*duck | duckling
*goose | gosling
*bear | cub
*lion | cub
*deer | fawn
*kangaroo | joey
*frog | tadpole
*whale | calf
*elephant | calf
*butterfly | caterpillar
swan | cygnet
hare | leveret
seal | pup
turkey | poult
"""

# book or play | author
BOOKS = """
*Hamlet | William Shakespeare
*Macbeth | William Shakespeare
*Pride and Prejudice | Jane Austen
*Emma | Jane Austen
*Oliver Twist | Charles Dickens
*Great Expectations | Charles Dickens
*A Christmas Carol | Charles Dickens
*1984 | George Orwell
*Animal Farm | George Orwell
*War and Peace | Leo Tolstoy
*Anna Karenina | Leo Tolstoy
*Crime and Punishment | Fyodor Dostoevsky
*Don Quixote | Miguel de Cervantes
*Moby-Dick | Herman Melville
*The Great Gatsby | F. Scott Fitzgerald
*The Old Man and the Sea | Ernest Hemingway
*The Grapes of Wrath | John Steinbeck
*To Kill a Mockingbird | Harper Lee
*The Catcher in the Rye | J. D. Salinger
*The Hobbit | J. R. R. Tolkien
*The Lord of the Rings | J. R. R. Tolkien
*Frankenstein | Mary Shelley
*Dracula | Bram Stoker
*Jane Eyre | Charlotte Brontë
*Wuthering Heights | Emily Brontë
*Treasure Island | Robert Louis Stevenson
*The Jungle Book | Rudyard Kipling
*The Time Machine | H. G. Wells
*The Picture of Dorian Gray | Oscar Wilde
*The Divine Comedy | Dante Alighieri
*Faust | Johann Wolfgang von Goethe
*The Metamorphosis | Franz Kafka
*Les Misérables | Victor Hugo
*Brave New World | Aldous Huxley
*Fahrenheit 451 | Ray Bradbury
*The Adventures of Tom Sawyer | Mark Twain
*The Scarlet Letter | Nathaniel Hawthorne
*Gulliver's Travels | Jonathan Swift
*Robinson Crusoe | Daniel Defoe
*The Canterbury Tales | Geoffrey Chaucer
*Lord of the Flies | William Golding
*Charlotte's Web | E. B. White
Madame Bovary | Gustave Flaubert
Middlemarch | George Eliot
Mrs Dalloway | Virginia Woolf
Ulysses | James Joyce
The Magic Mountain | Thomas Mann
Things Fall Apart | Chinua Achebe
The Cherry Orchard | Anton Chekhov
Vanity Fair | William Makepeace Thackeray
"""


class Entity(NamedTuple):
    """One row of a table: its columns by name, and whether it is widely known."""

    columns: dict[str, str]
    known: bool


class Relation(NamedTuple):
    """
    What is asked about a table's rows: `subject` and `answer` name columns; `{s}` and `{a}` stand for them in the
    `sentences` that state the fact and the `questions` that ask for it. `recall=False` is asked for in `reading` only.
    """

    table: str
    subject: str
    answer: str
    sentences: tuple[str, ...]
    questions: tuple[str, ...]
    recall: bool = True


RELATIONS = (
    Relation(
        "elements",
        "name",
        "symbol",
        ("The chemical symbol of {s} is {a}.", "Chemists write {s} as {a}."),
        ("What is the chemical symbol of {s}?", "Which symbol stands for the element {s}?"),
    ),
    Relation(
        "elements",
        "symbol",
        "name",
        ("The chemical symbol {s} stands for {a}.", "{s} is the symbol of the element {a}."),
        ("Which element has the symbol {s}?", "What does the chemical symbol {s} stand for?"),
    ),
    Relation(
        "elements",
        "name",
        "number",
        ("The atomic number of {s} is {a}.", "The element {s} has the atomic number {a}."),
        ("What is the atomic number of {s}?", "Which atomic number does {s} have?"),
        recall=False,
    ),
    Relation(
        "countries",
        "country",
        "capital",
        ("The capital of {s} is {a}.", "{a} is the capital of {s}."),
        ("What is the capital of {s}?", "Which city is the capital of {s}?", "Which capital does {s} have?"),
    ),
    Relation(
        "countries",
        "capital",
        "country",
        ("The city of {s} is the capital of {a}.", "{s} is the capital of {a}."),
        ("Which country has the capital {s}?", "{s} is the capital of which country?"),
    ),
    Relation(
        "countries",
        "country",
        "continent",
        ("{s} is a country in {a}.", "{s} lies on the continent of {a}."),
        ("On which continent is {s}?", "Which continent does {s} belong to?"),
    ),
    Relation(
        "countries",
        "country",
        "currency",
        ("The currency of {s} is the {a}.", "In {s} people pay with the {a}."),
        ("What is the currency of {s}?", "Which currency is used in {s}?"),
    ),
    Relation(
        "countries",
        "country",
        "language",
        ("The main language of {s} is {a}.", "Most people in {s} speak {a}."),
        ("What is the main language of {s}?", "Which language do most people in {s} speak?"),
    ),
    Relation(
        "states",
        "state",
        "capital",
        ("The state capital of {s} is {a}.", "{a} is the state capital of {s}."),
        ("What is the state capital of {s}?", "Which city is the state capital of {s}?"),
    ),
    Relation(
        "states",
        "capital",
        "state",
        ("{s} is the state capital of {a}.", "The state capital {s} belongs to {a}."),
        ("Which U.S. state has the capital {s}?", "{s} is the state capital of which state?"),
    ),
    Relation(
        "animals",
        "animal",
        "class",
        ("{s} are {a}.", "{s} belong to the {a}."),
        ("Which class of animals do {s} belong to?", "What kind of animals are {s}?"),
    ),
    Relation(
        "young",
        "animal",
        "young",
        ("A young {s} is called a {a}.", "People call a young {s} a {a}."),
        ("What is a young {s} called?", "What do you call a young {s}?"),
    ),
    Relation(
        "books",
        "title",
        "author",
        ("{s} was written by {a}.", "{a} wrote {s}."),
        ("Who wrote {s}?", "Who is the author of {s}?"),
    ),
)


def _entity(columns: tuple[str, ...], values: list[str]) -> Entity:
    known = any(value.startswith("*") for value in values)
    return Entity(dict(zip(columns, (value.strip().lstrip("*") for value in values), strict=True)), known)


def _rows(text: str, *columns: str) -> list[Entity]:
    return [_entity(columns, line.split("|")) for line in text.strip().splitlines()]


def load_tables() -> dict[str, list[Entity]]:
    """
    Returns:
        `dict[str, list[Entity]]`: the rows of every table, by the name that a [`Relation`] knows it under.
    """
    elements = [cell.split() for line in ELEMENTS.strip().splitlines() for cell in line.split("|")]
    animals = [line.split(":") for line in ANIMALS.strip().splitlines()]
    return {
        "elements": [_entity(("symbol", "name", "number"), [*e, str(n)]) for n, e in enumerate(elements, start=1)],
        "countries": _rows(COUNTRIES, "country", "capital", "continent", "currency", "language"),
        "states": _rows(STATES, "state", "capital"),
        "animals": [
            _entity(("animal", "class"), [animal.strip(), group])
            for group, members in animals
            for animal in members.split(",")
        ],
        "young": _rows(YOUNG, "animal", "young"),
        "books": _rows(BOOKS, "title", "author"),
    }


def fill(template: str, relation: Relation, entity: Entity) -> str:
    """
    Writes a sentence or a question of `relation` about `entity`.

    Args:
        template (`str`): one of `relation.sentences` or `relation.questions`.
        relation (`Relation`): says which columns `{s}` and `{a}` are.
        entity (`Entity`): the row to write about.

    Returns:
        `str`: the text, with a capital first letter.
    """
    text = template.format(s=entity.columns[relation.subject], a=entity.columns[relation.answer])
    return text[0].upper() + text[1:]


def contains(text: str, answer: str) -> bool:
    """Whether `answer` (`str`) stands in `text` (`str`) as whole words: the symbol "C" is not in "Carbon"."""
    return re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", text) is not None


def _row(relation: Relation, entity: Entity, template: str, sentence: str | None = None) -> dict:
    """A question about `entity`: `reading` after the `sentence` that answers it, else `recalling`."""
    question = f"Question: {fill(template, relation, entity)}\nAnswer:"
    prompt = question if sentence is None else f"{fill(sentence, relation, entity)}\n{question}"
    task = "recalling" if sentence is None else "reading"
    return {"prompt": prompt, "completion": f" {entity.columns[relation.answer]}", "task": task}


def _swapped(relation: Relation, entity: Entity, others: list[Entity], rng: random.Random) -> Entity:
    """`entity` with another one's answer: what cannot be remembered has to be read."""
    return Entity({**entity.columns, relation.answer: rng.choice(others).columns[relation.answer]}, entity.known)


def _having(relation: Relation, entities: list[Entity]) -> list[Entity]:
    """The entities of which `relation` is known."""
    return [e for e in entities if e.columns[relation.subject] and e.columns[relation.answer]]


def build_facts(seed: int = 0, held_out: float = 0.2) -> tuple[list[dict], list[dict]]:
    """
    Builds both tasks, split by entity: no training row tells or asks anything of a held-out country, element, ...; its
    name, capital, ... may be the (wrong) answer that a training sentence gives of another.

    Args:
        seed (`int`, *optional*, defaults to 0):
            Seed of the split, the wordings, the shuffled answers and the order of the rows.
        held_out (`float`, *optional*, defaults to 0.2):
            Share of every table's entities that is kept for the test rows, between 0 and 1 (both excluded).

    Returns:
        `tuple[list[dict], list[dict]]`: training rows (every wording of a question; the sentences to read are shuffled
        facts, see `NUM_SWAPS`) and test rows (one wording a fact, all true). A row is
        `{"prompt": str, "completion": str, "task": "reading" or "recalling"}`; the completion starts with a space.

    Raises:
        `ValueError`: if `held_out` is not between 0 and 1.
    """
    if not 0 < held_out < 1:
        raise ValueError(f"`held_out` is {held_out!r}, but must lie between 0 and 1 (both excluded).")
    rng = random.Random(seed)
    splits: tuple[dict[str, list[Entity]], dict[str, list[Entity]]] = ({}, {})
    for name, table in load_tables().items():
        train: list[Entity] = []
        test: list[Entity] = []
        for known in (True, False):  # both kinds in the same share, so the size of `recalling` does not depend on luck
            group = [entity for entity in table if entity.known is known]
            rng.shuffle(group)
            cut = round(len(group) * held_out)
            test += group[:cut]
            train += group[cut:]
        splits[0][name], splits[1][name] = train, test

    results: tuple[list[dict], list[dict]] = ([], [])
    for split, rows, training in zip(splits, results, (True, False), strict=True):
        for relation in RELATIONS:
            every = [e for entities in splits for e in _having(relation, entities[relation.table])]
            for entity in _having(relation, split[relation.table]):
                for template in relation.questions if training else [rng.choice(relation.questions)]:
                    for _ in range(NUM_SWAPS if training else 1):
                        told = _swapped(relation, entity, every, rng) if training else entity
                        rows.append(_row(relation, told, template, rng.choice(relation.sentences)))
                    recall = _row(relation, entity, template)
                    if entity.known and relation.recall and not contains(recall["prompt"], recall["completion"][1:]):
                        rows.append(recall)
        rows[:] = {row["prompt"]: row for row in rows}.values()  # a swap may come up twice
        rng.shuffle(rows)
    return results


def main() -> None:
    for name, rows in zip(("train", "test"), build_facts(), strict=True):
        for task in ("reading", "recalling"):
            chosen = [row for row in rows if row["task"] == task]
            print(f"\n== {name}, {task}: {len(chosen)} rows")
            for row in chosen[:3]:
                print(f"{row['prompt']}{row['completion']}\n")


if __name__ == "__main__":
    main()
