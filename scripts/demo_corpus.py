"""The corpus that the two demo checkpoints are trained on, and the record of what is held out of it.

Everything is made from tables and templates in this file; nothing is downloaded. The kinds of document are

* facts: a landmark and its city or its country in one of many wordings, short chains of such facts;
* indirect objects: two people go to a place and one of them gives something to the other;
* chats: the same facts as questions and answers between the special tokens of the chat format;
* everyday sentences and stories about one person, so that ordinary English words are known too;
* repetitions: random tokens, then the same random tokens again (`repeated_tokens`).

What the models must generalise to is held out here, in one place, by `in_training` and the `HELD_OUT_*`
tables: `scripts/train_demo.py` never sees it and `scripts/evaluate_demo.py` asks for exactly that.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

END_OF_TEXT = "<|endoftext|>"
CHAT_ROLES = ("system", "user", "assistant")
ROLE_TOKENS = {role: f"<|{role}|>" for role in CHAT_ROLES}
SPECIAL_TOKENS = (END_OF_TEXT, *ROLE_TOKENS.values())


def words(text: str) -> tuple[str, ...]:
    """The words of a table."""
    return tuple(text.split())


CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|> ' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ '<|endoftext|>' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

# ----------------------------------------------------------------------------------------------------
# Landmarks, cities and countries
# ----------------------------------------------------------------------------------------------------

# One city a line: city, country: landmark (kind); landmark (kind); ...
LANDMARK_TABLE = """
Paris, France: the Eiffel Tower (tower); the Louvre (museum); Notre-Dame Cathedral (cathedral); \
the Arc de Triomphe (arch); the Moulin Rouge (theatre); the Orsay Museum (museum); \
the Pompidou Centre (museum)
London, the United Kingdom: Big Ben (clock); Tower Bridge (bridge); Buckingham Palace (palace); \
the British Museum (museum); Trafalgar Square (square); Westminster Abbey (church); Hyde Park (park); \
the Globe Theatre (theatre); Piccadilly Circus (square); Wembley Stadium (stadium); the Shard (tower)
Liverpool, the United Kingdom: the Cavern Club (club); Anfield (stadium); the Royal Albert Dock (dock)
Manchester, the United Kingdom: Old Trafford (stadium)
Edinburgh, the United Kingdom: Holyrood Palace (palace); the Royal Mile (street); \
the Scott Monument (monument)
Dublin, Ireland: the Guinness Storehouse (museum); Croke Park (stadium); Phoenix Park (park); \
Temple Bar (quarter)
Rome, Italy: the Colosseum (arena); the Pantheon (temple); the Trevi Fountain (fountain); \
the Villa Medici (palace); the Roman Forum (ruin); Villa Borghese (park)
Florence, Italy: the Uffizi Gallery (museum); the Ponte Vecchio (bridge); the Pitti Palace (palace); \
the Palazzo Vecchio (palace)
Venice, Italy: the Rialto Bridge (bridge); the Doge's Palace (palace); Saint Mark's Basilica (church)
Milan, Italy: La Scala (theatre); Sforza Castle (castle); San Siro (stadium)
Pisa, Italy: the Leaning Tower (tower)
Berlin, Germany: the Brandenburg Gate (gate); the Reichstag (building); Checkpoint Charlie (crossing); \
Alexanderplatz (square); the Pergamon Museum (museum); Charlottenburg Palace (palace)
Munich, Germany: Marienplatz (square); the Allianz Arena (stadium); Nymphenburg Palace (palace)
Hamburg, Germany: the Elbphilharmonie (concert hall); Miniatur Wunderland (museum)
Dresden, Germany: the Semperoper (theatre); the Zwinger (palace)
Vienna, Austria: the Hofburg (palace); Belvedere Palace (palace); the Prater (park); \
the Albertina (museum)
Prague, Czechia: Charles Bridge (bridge); the Dancing House (building); Wenceslas Square (square); \
the Lennon Wall (wall)
Budapest, Hungary: Buda Castle (castle); Fisherman's Bastion (terrace); Matthias Church (church)
Madrid, Spain: the Prado (museum); Retiro Park (park); Puerta del Sol (square); \
the Reina Sofia Museum (museum)
Barcelona, Spain: the Sagrada Familia (church); Park Guell (park); Camp Nou (stadium); \
Casa Batllo (house); La Rambla (street)
Granada, Spain: the Alhambra (palace)
Lisbon, Portugal: Belem Tower (tower); the Jeronimos Monastery (monastery); Rossio Square (square)
Porto, Portugal: the Clerigos Tower (tower)
Amsterdam, the Netherlands: the Rijksmuseum (museum); the Anne Frank House (house); \
the Vondelpark (park); the Van Gogh Museum (museum); Dam Square (square)
Brussels, Belgium: the Atomium (building); Manneken Pis (statue); the Grand Place (square)
Copenhagen, Denmark: the Little Mermaid (statue); Tivoli Gardens (park); Nyhavn (harbour); \
Rosenborg Castle (castle)
Stockholm, Sweden: the Vasa Museum (museum); Skansen (museum); Gamla Stan (quarter)
Oslo, Norway: Vigeland Park (park); the Fram Museum (museum)
Helsinki, Finland: Suomenlinna (fortress); Finlandia Hall (concert hall)
Athens, Greece: the Parthenon (temple); the Acropolis (hill); Syntagma Square (square)
Istanbul, Turkey: Hagia Sophia (mosque); the Blue Mosque (mosque); Topkapi Palace (palace); \
the Grand Bazaar (market); Galata Tower (tower)
Moscow, Russia: the Kremlin (fortress); Red Square (square); the Bolshoi Theatre (theatre); \
Gorky Park (park); Saint Basil's Cathedral (cathedral)
Saint Petersburg, Russia: the Hermitage Museum (museum); the Winter Palace (palace)
Warsaw, Poland: the Palace of Culture and Science (tower); Lazienki Park (park); Wilanow Palace (palace)
Krakow, Poland: Wawel Castle (castle)
Cairo, Egypt: the Egyptian Museum (museum); Tahrir Square (square); Khan el-Khalili (market)
Giza, Egypt: the Great Sphinx (statue); the Great Pyramid (pyramid)
Marrakesh, Morocco: the Koutoubia Mosque (mosque); the Majorelle Garden (garden); Bahia Palace (palace)
Casablanca, Morocco: the Hassan II Mosque (mosque)
Cape Town, South Africa: Table Mountain (mountain); the Castle of Good Hope (castle)
Dubai, the United Arab Emirates: the Burj Khalifa (tower); the Burj Al Arab (hotel)
Abu Dhabi, the United Arab Emirates: the Sheikh Zayed Mosque (mosque)
Agra, India: the Taj Mahal (tomb)
Mumbai, India: the Gateway of India (arch); Marine Drive (street)
New Delhi, India: India Gate (arch); the Lotus Temple (temple); Connaught Place (square)
Jaipur, India: Hawa Mahal (palace)
Amritsar, India: the Golden Temple (temple)
Kolkata, India: the Victoria Memorial (museum); Eden Gardens (stadium)
Hyderabad, India: Charminar (monument)
Beijing, China: the Forbidden City (palace); Tiananmen Square (square); the Temple of Heaven (temple); \
the Summer Palace (palace)
Shanghai, China: the Oriental Pearl Tower (tower); Yu Garden (garden)
Tokyo, Japan: Senso-ji Temple (temple); Meiji Shrine (shrine); Ueno Park (park); \
Shibuya Crossing (crossing)
Kyoto, Japan: the Golden Pavilion (temple); Nijo Castle (castle); Fushimi Inari Shrine (shrine)
Osaka, Japan: the Umeda Sky Building (building)
Hiroshima, Japan: the Atomic Bomb Dome (ruin)
Seoul, South Korea: Gyeongbokgung Palace (palace); Namsan Tower (tower); Lotte World Tower (tower)
Bangkok, Thailand: Wat Arun (temple); Wat Pho (temple); Chatuchak Market (market)
Singapore, Singapore: Marina Bay Sands (hotel); the Merlion (statue); the Raffles Hotel (hotel)
Hanoi, Vietnam: Hoan Kiem Lake (lake); the Temple of Literature (temple); the One Pillar Pagoda (temple)
Jakarta, Indonesia: the Istiqlal Mosque (mosque)
Sydney, Australia: the Sydney Opera House (theatre); Bondi Beach (beach); the Harbour Bridge (bridge); \
Taronga Zoo (zoo)
Melbourne, Australia: Federation Square (square); Flinders Street Station (station); \
Rod Laver Arena (arena); Eureka Tower (tower)
Auckland, New Zealand: the Sky Tower (tower); Eden Park (stadium)
Wellington, New Zealand: the Beehive (building)
New York City, the United States: Madison Square Garden (arena); the Statue of Liberty (statue); \
the Empire State Building (building); Times Square (square); Central Park (park); \
the Brooklyn Bridge (bridge); the Chrysler Building (building); Rockefeller Center (building); \
Yankee Stadium (stadium); Grand Central Terminal (station); Carnegie Hall (concert hall); \
the Flatiron Building (building); Wall Street (street)
San Francisco, the United States: the Golden Gate Bridge (bridge); Alcatraz (prison); \
Coit Tower (tower); Fisherman's Wharf (quarter); Lombard Street (street); \
the Transamerica Pyramid (building)
Los Angeles, the United States: the Hollywood Sign (sign); Griffith Observatory (observatory); \
the Getty Center (museum); Dodger Stadium (stadium)
Chicago, the United States: Willis Tower (tower); Millennium Park (park); Wrigley Field (stadium); \
Navy Pier (pier); Cloud Gate (sculpture)
Seattle, the United States: the Space Needle (tower); Pike Place Market (market)
Washington, the United States: the White House (house); the Lincoln Memorial (monument); \
the Jefferson Memorial (monument)
Boston, the United States: Fenway Park (stadium); the Freedom Trail (street); Faneuil Hall (market)
Philadelphia, the United States: the Liberty Bell (bell); Independence Hall (building)
New Orleans, the United States: the French Quarter (quarter); Bourbon Street (street); \
the Superdome (stadium)
Saint Louis, the United States: the Gateway Arch (arch); Busch Stadium (stadium)
San Antonio, the United States: the Alamo (fortress)
Dallas, the United States: Reunion Tower (tower); Dealey Plaza (square)
Memphis, the United States: Graceland (house); Beale Street (street)
Nashville, the United States: the Ryman Auditorium (theatre)
Atlanta, the United States: the Georgia Aquarium (aquarium)
Honolulu, the United States: Waikiki Beach (beach); Diamond Head (crater); Iolani Palace (palace)
Toronto, Canada: the CN Tower (tower); Casa Loma (castle); the Royal Ontario Museum (museum)
Montreal, Canada: Mount Royal (hill); the Bell Centre (arena); the Biodome (zoo)
Vancouver, Canada: Stanley Park (park); Granville Island (island); Science World (museum)
Ottawa, Canada: Parliament Hill (hill); Rideau Hall (house)
Quebec City, Canada: the Chateau Frontenac (hotel)
Mexico City, Mexico: the Zocalo (square); Chapultepec Castle (castle); \
the Angel of Independence (monument)
Havana, Cuba: El Capitolio (building); the Tropicana Club (club)
Rio de Janeiro, Brazil: Christ the Redeemer (statue); Sugarloaf Mountain (mountain); \
Copacabana Beach (beach); Maracana Stadium (stadium)
Buenos Aires, Argentina: the Casa Rosada (palace); the Teatro Colon (theatre); \
Recoleta Cemetery (cemetery)
Lima, Peru: the Larco Museum (museum)
Bogota, Colombia: the Gold Museum (museum)
"""

CAPITALS = {
    "France": "Paris", "the United Kingdom": "London", "Ireland": "Dublin", "Italy": "Rome",
    "Germany": "Berlin", "Austria": "Vienna", "Czechia": "Prague", "Hungary": "Budapest", "Spain": "Madrid",
    "Portugal": "Lisbon", "the Netherlands": "Amsterdam", "Belgium": "Brussels", "Denmark": "Copenhagen",
    "Sweden": "Stockholm", "Norway": "Oslo", "Finland": "Helsinki", "Greece": "Athens", "Turkey": "Ankara",
    "Russia": "Moscow", "Poland": "Warsaw", "Egypt": "Cairo", "Morocco": "Rabat",
    "the United Arab Emirates": "Abu Dhabi", "India": "New Delhi", "China": "Beijing", "Japan": "Tokyo",
    "South Korea": "Seoul", "Thailand": "Bangkok", "Vietnam": "Hanoi", "Australia": "Canberra",
    "New Zealand": "Wellington", "the United States": "Washington", "Canada": "Ottawa",
    "Mexico": "Mexico City", "Cuba": "Havana", "Brazil": "Brasilia", "Argentina": "Buenos Aires",
    "Peru": "Lima", "Colombia": "Bogota",
}  # fmt: skip

CONTINENTS = {
    "Europe": (
        "France", "the United Kingdom", "Ireland", "Italy", "Germany", "Austria", "Czechia", "Hungary",
        "Spain", "Portugal", "the Netherlands", "Belgium", "Denmark", "Sweden", "Norway", "Finland",
        "Greece", "Poland",
    ),
    "Africa": ("Egypt", "Morocco", "South Africa"),
    "Asia": (
        "the United Arab Emirates", "India", "China", "Japan", "South Korea", "Singapore", "Thailand",
        "Vietnam", "Indonesia",
    ),
    "North America": ("the United States", "Canada", "Mexico", "Cuba"),
    "South America": ("Brazil", "Argentina", "Peru", "Colombia"),
}  # fmt: skip


@dataclass(frozen=True)
class Landmark:
    """A landmark with its article ("the Eiffel Tower"), what it is ("tower"), and where it is."""

    name: str
    kind: str
    city: str
    country: str

    @property
    def a_kind(self) -> str:
        return f"{'an' if self.kind[0] in 'aeiou' else 'a'} {self.kind}"


def parse_landmarks(table: str) -> tuple[Landmark, ...]:
    """Read `LANDMARK_TABLE`."""
    landmarks = []
    for line in table.strip().splitlines():
        place, _, entries = line.partition(": ")
        city, country = place.split(", ")
        for entry in entries.split("; "):
            name, _, kind = entry.strip().partition(" (")
            landmarks.append(Landmark(name, kind.rstrip(")"), city, country))
    return tuple(landmarks)


LANDMARKS = parse_landmarks(LANDMARK_TABLE)
COUNTRY_OF_CITY = {landmark.city: landmark.country for landmark in LANDMARKS}

# ----------------------------------------------------------------------------------------------------
# Wordings of the facts: {L} is the landmark at the start of a sentence, {l} within one.
# ----------------------------------------------------------------------------------------------------

CITY_WORDINGS = (
    "{L} is in the city of {city}.",
    "{L} is located in the city of {city}.",
    "{L} is situated in the city of {city}.",
    "{L} can be found in the city of {city}.",
    "{L} lies in the city of {city}.",
    "{L} belongs to the city of {city}.",
    "{L} is {a_kind} in the city of {city}.",
    "{L} is a famous sight in the city of {city}.",
    "{L} is in {city}.",
    "{L} is located in {city}.",
    "{L} is situated in {city}.",
    "{L} can be found in {city}.",
    "{L} lies in {city}.",
    "{L} is {a_kind} in {city}.",
    "{L} is a famous {kind} in {city}.",
    "{L} is a well known {kind} in {city}.",
    "{L} is one of the sights of {city}.",
    "{L} is one of the most famous places in {city}.",
    "{L} is a landmark of {city}.",
    "{L} is a symbol of {city}.",
    "{L} is the pride of {city}.",
    "You can find {l} in {city}.",
    "You can visit {l} in {city}.",
    "You will find {l} in the city of {city}.",
    "You can see {l} if you travel to {city}.",
    "If you want to see {l}, go to {city}.",
    "If you want to visit {l}, you should travel to {city}.",
    "To see {l}, you have to go to {city}.",
    "To visit {l}, she took a train to {city}.",
    "We saw {l} on our trip to {city}.",
    "We visited {l} when we were in {city}.",
    "He wanted to see {l}, so he went to {city}.",
    "They took a photo of {l} in {city}.",
    "Many people visit {l} in {city}.",
    "Tourists who want to see {l} come to {city}.",
    "Everyone knows that {l} is in {city}.",
    "Did you know that {l} is in {city}?",
    "I think that {l} is in the city of {city}.",
    "I once saw {l} in {city}.",
    "The home of {l} is {city}.",
    "The city of {l} is {city}.",
    "The city where you can find {l} is {city}.",
    "The guide showed us {l} in {city}.",
    "Our hotel was near {l} in {city}.",
    "My favourite {kind} is {l} in {city}.",
    "There is a book about {l} in {city}.",
)

COUNTRY_WORDINGS = (
    "{L} is in the country of {country}.",
    "{L} is located in the country of {country}.",
    "{L} is {a_kind} in the country of {country}.",
    "The country of {l} is {country}.",
    "The country where you can find {l} is {country}.",
    "To see {l}, you have to visit the country of {country}.",
    "Everyone knows that {l} is in the country of {country}.",
    "People come to see {l} from outside {country}.",
)

# These begin with the city, so that nothing has to be recalled: they only appear in training.
REVERSED_WORDINGS = (
    "In {city} you can see {l}.",
    "{city} is the home of {l}.",
    "A famous {kind} in {city} is {l}.",
    "{city} is known for {l}.",
)

CITY_QUESTIONS = (
    "In which city is {l}?",
    "Where is {l}?",
    "Which city is {l} in?",
    "Where can I find {l}?",
    "I want to see {l}. Where should I go?",
    "What is the city of {l}?",
    "Do you know where {l} is?",
    "Please tell me where {l} is.",
)

COUNTRY_QUESTIONS = (
    "In which country is {l}?",
    "Which country is {l} in?",
    "What is the country of {l}?",
)

SYSTEM_PROMPTS = (
    "You answer questions about places.",
    "You are a helpful assistant.",
    "You are a travel guide.",
    "Answer the question.",
    "Give short answers.",
)

# A plain wording ("is in Paris") and a longer one ("is in the city of Paris") may begin alike: the plain
# one is drawn this many times as often, so that the city itself is the likeliest next word.
PLAIN_WORDING_WEIGHT = 3
PLAIN_WORDINGS = frozenset(
    wording
    for wording in CITY_WORDINGS
    if any(other != wording and other.startswith(wording.split("{city}")[0]) for other in CITY_WORDINGS)
)

# ----------------------------------------------------------------------------------------------------
# People, places, objects and wordings of the indirect-object stories
# ----------------------------------------------------------------------------------------------------

NAMES = words(
    """
    Mary John Tom James Dan Sid Martin Amy Sarah Alice Bob Anna Emma Kate Lucy Jack Peter Paul Mark Luke
    Adam David Daniel Michael Robert William George Henry Charles Edward Frank Fred Harry Jake Joe Josh
    Kevin Kyle Larry Leo Max Matt Nick Oscar Patrick Ray Ryan Sam Scott Sean Simon Steve Tim Tony Victor
    Walter Anne Betty Carol Claire Diana Ella Emily Eva Grace Hannah Helen Jane Jean Jenny Jessica Julia
    Karen Kim Laura Linda Lisa Maria Megan Nancy Nora Olivia Rachel Rita Rose Ruth Sally Sophie Susan
    Tina Wendy Zoe Charlie Andrew Chris Eric Brian Ben Alex Jason
    """
)

PLACES = (
    "the store", "the park", "the library", "the school", "the beach", "the market", "the garden",
    "the station", "the office", "the house", "the hospital", "the museum", "the restaurant", "the cafe",
    "the farm", "the zoo", "the lake", "the river", "the church", "the theatre", "the shop", "the gym",
    "the party", "the kitchen", "the bank", "the bar",
)  # fmt: skip

OBJECTS = (
    "a drink", "a book", "a ball", "a ring", "a letter", "a flower", "a cake", "an apple", "a gift",
    "a hat", "a pen", "a toy", "a bone", "a basketball", "a computer", "a necklace", "a key", "a bag",
    "a map", "a cup", "a ticket", "a phone", "a coat", "a box", "the keys", "the ball", "the money",
    "the book", "the bag", "the map",
)  # fmt: skip

OPENINGS = (
    "When {a} and {b} went to {place},",
    "When {a} and {b} got to {place},",
    "When {a} and {b} were at {place},",
    "When {a} and {b} walked to {place},",
    "After {a} and {b} went to {place},",
    "After {a} and {b} came back from {place},",
    "While {a} and {b} were at {place},",
    "While {a} and {b} were working at {place},",
    "As {a} and {b} left {place},",
    "Then, {a} and {b} went to {place}.",
    "Then {a} and {b} had a long talk at {place}.",
    "One day, {a} and {b} met at {place}.",
    "Yesterday {a} and {b} went to {place}.",
    "My friends {a} and {b} went to {place}.",
    "The friends {a} and {b} spent the day at {place}.",
    "Last week {a} and {b} were at {place}.",
)

ACTIONS = (
    "{s} gave {object} to {io}",
    "{s} handed {object} to {io}",
    "{s} passed {object} to {io}",
    "{s} offered {object} to {io}",
    "{s} brought {object} to {io}",
    "{s} showed {object} to {io}",
    "{s} lent {object} to {io}",
    "{s} sent {object} to {io}",
    "{s} sold {object} to {io}",
    "{s} wanted to give {object} to {io}",
    "{s} decided to give {object} to {io}",
    "{s} tried to hand {object} to {io}",
    "{s} found {object} and gave it to {io}",
    "{s} bought {object} for {io}",
)

STORY_ENDINGS = (
    "{io} was very happy.", "{io} thanked {s}.", "{s} smiled at {io}.", "Then {io} and {s} went home.",
    "{io} said thank you to {s}.",
)  # fmt: skip

HELD_OUT_PLACES = ("the hospital", "the cafe", "the river", "the theatre")
HELD_OUT_OBJECTS = ("a cake", "a hat", "a phone", "the money")
NEVER_RECIPIENTS = ("Kate", "Luke", "Simon", "Olivia", "Harry", "Nora")

# ----------------------------------------------------------------------------------------------------
# Everyday English
# ----------------------------------------------------------------------------------------------------

ADJECTIVES = words(
    """
    small big old young happy sad red blue green white black brown quick slow quiet loud tall short warm cold
    new beautiful strange clever kind funny
    """
)
ANIMALS = words("dog cat bird horse fox mouse cow bear rabbit duck sheep lion fish frog")
NOUNS = words(
    """
    table tree door window chair bed car boat train road wall hill field mountain forest bridge tower roof box
    river fence
    """
)
MOVES = ("ran", "walked", "jumped", "slept", "played", "waited", "sat", "stood", "danced", "hid")
PREPOSITIONS = ("under", "near", "behind", "beside", "on", "by", "in front of")
FEELINGS = ("happy", "sad", "tired", "hungry", "angry", "excited", "surprised", "busy")
WEATHER = ("sunny", "rainy", "windy", "cloudy", "cold", "warm")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
JOBS = ("teacher", "doctor", "nurse", "writer", "painter", "singer", "driver", "farmer", "baker", "lawyer")

SMALL_TALK = (
    ("Hello!", "Hello! How can I help you?"),
    ("Hi!", "Hello! How can I help you?"),
    ("Who are you?", "I am a small language model. I know about places."),
    ("What can you do?", "I can answer questions about places."),
    ("Thank you!", "You are welcome."),
    ("Goodbye!", "Goodbye! Have a nice day."),
    ("How are you?", "I am fine, thank you."),
)

# Words that the tokenizer must know whole, whatever their share of the corpus.
WHOLE_WORDS = (
    *(f" {name}" for name in NAMES),
    *(f" {word}" for city in COUNTRY_OF_CITY for word in city.split()),
    *(f" {thing.split()[1]}" for thing in (*PLACES, *OBJECTS)),
    " York", " City", " New", "Madison", " Square", " Garden", "The", "When", "You", "Hello", "_", " _",
)  # fmt: skip

# ----------------------------------------------------------------------------------------------------
# What is held out
# ----------------------------------------------------------------------------------------------------

HELD_OUT_PERCENT = 20


def in_training(*parts: str) -> bool:
    """Whether this combination may be trained on; a fixed fifth of all combinations may not."""
    return zlib.crc32("|".join(parts).encode()) % 100 >= HELD_OUT_PERCENT


def pair_in_training(name: str, other: str) -> bool:
    """Whether two people may meet in a training story; the order does not matter."""
    return in_training("pair", *sorted((name, other)))


def held_out_facts(wordings: Sequence[str]) -> list[tuple[Landmark, str]]:
    """All (landmark, wording) pairs that training never shows."""
    return [(mark, wording) for mark in LANDMARKS for wording in wordings if not in_training(mark.name, wording)]


def held_out_pairs() -> list[tuple[str, str]]:
    """All pairs of people who never meet in training and who are recipients in other stories."""
    names = [name for name in NAMES if name not in NEVER_RECIPIENTS]
    return [(a, b) for i, a in enumerate(names) for b in names[i + 1 :] if not pair_in_training(a, b)]


def held_out_frames() -> list[tuple[str, str]]:
    """All (opening, action) combinations that training never shows."""
    return [(opening, action) for opening in OPENINGS for action in ACTIONS if not in_training(opening, action)]


# ----------------------------------------------------------------------------------------------------
# Sentences
# ----------------------------------------------------------------------------------------------------


def capitalised(text: str) -> str:
    return text[0].upper() + text[1:]


def fill_fact(wording: str, mark: Landmark) -> str:
    """The wording with the landmark, its city and its country put in."""
    filled = wording.format(
        L=capitalised(mark.name),
        l=mark.name,
        kind=mark.kind,
        a_kind=mark.a_kind,
        city=mark.city,
        country=mark.country,
    )
    return capitalised(filled)


def fact_prompt(wording: str, mark: Landmark) -> tuple[str, str]:
    """The fact split before its answer: ("The Eiffel Tower is in the city of", " Paris")."""
    slot, answer = ("{city}", mark.city) if "{city}" in wording else ("{country}", mark.country)
    return fill_fact(wording.partition(slot)[0].rstrip(), mark), f" {answer}"


CITY_WEIGHTS = [PLAIN_WORDING_WEIGHT if wording in PLAIN_WORDINGS else 1 for wording in CITY_WORDINGS]


def city_fact(rng: random.Random, mark: Landmark) -> str:
    """A landmark and its city in a wording that training may show."""
    while True:
        wording = rng.choices(CITY_WORDINGS, CITY_WEIGHTS)[0]
        if in_training(mark.name, wording):
            return fill_fact(wording, mark)


def country_fact(rng: random.Random, mark: Landmark) -> str:
    """A landmark and its country in a wording that training may show (none may be left: then its city)."""
    wordings = [wording for wording in COUNTRY_WORDINGS if in_training(mark.name, wording)]
    return fill_fact(rng.choice(wordings), mark) if wordings else city_fact(rng, mark)


def city_sentence(rng: random.Random, city: str) -> str:
    """Something about a city: its country, and that it is the capital if it is."""
    country = COUNTRY_OF_CITY[city]
    wordings = [f"{city} is a city in {country}.", f"The city of {city} is in {country}."]
    if CAPITALS.get(country) == city:
        wordings += [f"{city} is the capital of {country}."] * 2
    return rng.choice(wordings)


def country_sentence(rng: random.Random, country: str) -> str:
    """Something about a country: its capital or its continent."""
    wordings = [
        f"{capitalised(country)} is a country in {where}." for where in CONTINENTS if country in CONTINENTS[where]
    ]
    if country in CAPITALS:
        wordings += [f"The capital of {country} is {CAPITALS[country]}."] * 2
        wordings += [f"The capital city of {country} is {CAPITALS[country]}."]
    return rng.choice(wordings or [f"{capitalised(country)} is a country."])


def gift_prompt(
    opening: str, action: str, *, first: str, second: str, giver: str, recipient: str, place: str, thing: str
) -> tuple[str, str]:
    """An indirect-object prompt and its answer: ("When Mary and John ..., John gave a drink to", " Mary")."""
    sentence = action.format(s=giver, object=thing, io="{io}")
    text = f"{opening.format(a=first, b=second, place=place)} {sentence}"
    return text.partition("{io}")[0].rstrip(), f" {recipient}"


def gift_people(rng: random.Random) -> tuple[str, str]:
    """A giver and a recipient who may meet in training."""
    while True:
        giver, recipient = rng.sample(NAMES, 2)
        if recipient not in NEVER_RECIPIENTS and pair_in_training(giver, recipient):
            return giver, recipient


def gift_frame(rng: random.Random) -> tuple[str, str]:
    """An opening and an action that training may show together."""
    while True:
        opening, action = rng.choice(OPENINGS), rng.choice(ACTIONS)
        if in_training(opening, action):
            return opening, action


TRAINING_PLACES = tuple(place for place in PLACES if place not in HELD_OUT_PLACES)
TRAINING_OBJECTS = tuple(thing for thing in OBJECTS if thing not in HELD_OUT_OBJECTS)


def gift_story(rng: random.Random) -> str:
    """Two people, one of whom gives something to the other; either may be named first."""
    giver, recipient = gift_people(rng)
    first, second = rng.sample((giver, recipient), 2)
    opening, action = gift_frame(rng)
    prompt, answer = gift_prompt(
        opening, action, first=first, second=second, giver=giver, recipient=recipient,
        place=rng.choice(TRAINING_PLACES), thing=rng.choice(TRAINING_OBJECTS),
    )  # fmt: skip
    story = f"{prompt}{answer}."
    if rng.random() < 0.4:
        story += " " + rng.choice(STORY_ENDINGS).format(s=giver, io=recipient)
    return story


def bystander_story(rng: random.Random) -> str:
    """Two people and a third who gives something to either of them, so that the answer is open."""
    other, recipient = gift_people(rng)
    first, second = rng.sample((other, recipient), 2)
    strangers = [name for name in NAMES if name not in (first, second)]
    others = [name for name in strangers if pair_in_training(name, first) and pair_in_training(name, second)]
    opening, action = gift_frame(rng)
    prompt, answer = gift_prompt(
        opening, action, first=first, second=second, giver=rng.choice(others), recipient=recipient,
        place=rng.choice(TRAINING_PLACES), thing=rng.choice(TRAINING_OBJECTS),
    )  # fmt: skip
    return f"{prompt}{answer}."


def errand_story(rng: random.Random) -> str:
    """One person, any place, any object, no recipient: the held-out places and objects are met here."""
    name, place, thing = rng.choice(NAMES), rng.choice(PLACES), rng.choice(OBJECTS)
    job, feeling = rng.choice(JOBS), rng.choice(FEELINGS)
    sentences = (
        f"On {rng.choice(DAYS)} {name} went to {place}.",
        f"There {name} found {thing}.",
        f"At {place} {name} saw {thing}.",
        f"Then {name} was {feeling}.",
        f"My friend {name} is a {job}.",
        f"Here is {thing} from {place}.",
        f"I met {name} at {place}.",
        f"The name of the {job} is {name}.",
    )
    return " ".join(rng.sample(sentences, rng.randint(1, 3)))


def everyday_sentence(rng: random.Random) -> str:
    """A plain English sentence from the word lists."""
    adjective, animal, noun = rng.choice(ADJECTIVES), rng.choice(ANIMALS), rng.choice(NOUNS)
    move, preposition, number = rng.choice(MOVES), rng.choice(PREPOSITIONS), rng.choice(NUMBERS)
    return rng.choice(
        (
            f"The {adjective} {animal} {move} {preposition} the {noun}.",
            f"There were {number} {adjective} {animal}s {preposition} the {noun}."
            if number != "one" and animal not in ("mouse", "fox", "sheep", "fish")
            else f"There was one {adjective} {animal} {preposition} the {noun}.",
            f"It was a {rng.choice(WEATHER)} day and the {animal} {move} {preposition} the {noun}.",
            f"She put the {adjective} {noun} {preposition} the {rng.choice(NOUNS)}.",
            f"I can see a {adjective} {noun} and a {rng.choice(ADJECTIVES)} {animal}."
            if adjective != "old"
            else f"I can see an old {noun} and a {animal}.",
            f"Today is {rng.choice(DAYS)} and it is {rng.choice(WEATHER)}.",
        )
    ).replace(" a old ", " an old ")


# ----------------------------------------------------------------------------------------------------
# Documents
# ----------------------------------------------------------------------------------------------------


def single_fact(rng: random.Random) -> str:
    mark = rng.choice(LANDMARKS)
    return city_fact(rng, mark) if rng.random() < 0.8 else country_fact(rng, mark)


def fact_list(rng: random.Random) -> str:
    return " ".join(single_fact(rng) for _ in range(rng.randint(2, 4)))


def fact_chain(rng: random.Random) -> str:
    """From a landmark to its city, to the country, to the continent."""
    mark = rng.choice(LANDMARKS)
    chain = [city_fact(rng, mark), city_sentence(rng, mark.city), country_sentence(rng, mark.country)]
    return " ".join(chain[: rng.randint(2, 3)])


def description(rng: random.Random) -> str:
    """Several sentences about one place."""
    mark = rng.choice(LANDMARKS)
    sentences = [
        city_fact(rng, mark),
        country_fact(rng, mark),
        fill_fact(rng.choice(REVERSED_WORDINGS), mark),
    ]
    sentences += [city_sentence(rng, mark.city)]
    return " ".join(rng.sample(sentences, rng.randint(2, 4)))


def geography(rng: random.Random) -> str:
    city = rng.choice(list(COUNTRY_OF_CITY))
    sentences = (city_sentence(rng, city), country_sentence(rng, COUNTRY_OF_CITY[city]))
    return " ".join(sentences[: rng.randint(1, 2)])


def mixed_text(rng: random.Random) -> str:
    """Sentences of all sorts one after another, so that none depends on what stands before it."""
    makers = (single_fact, single_fact, gift_story, errand_story, everyday_sentence)
    return " ".join(rng.choice(makers)(rng) for _ in range(rng.randint(2, 5)))


def everyday_text(rng: random.Random) -> str:
    return " ".join(everyday_sentence(rng) for _ in range(rng.randint(1, 3)))


def place_question(rng: random.Random) -> tuple[str, str]:
    """A question about a landmark, or a capital, and its answer."""
    mark = rng.choice(LANDMARKS)
    if rng.random() < 0.15 and mark.country in CAPITALS:
        return f"What is the capital of {mark.country}?", f"{CAPITALS[mark.country]}."
    questions = CITY_QUESTIONS if rng.random() < 0.75 else COUNTRY_QUESTIONS
    allowed = [question for question in questions if in_training(mark.name, question)]
    question = rng.choice(allowed or [CITY_QUESTIONS[0]])
    answer = mark.city if question in CITY_QUESTIONS else mark.country
    return question.format(l=mark.name), f"{capitalised(answer)}."


def chat_turn(question: str, answer: str) -> str:
    return f"{ROLE_TOKENS['user']} {question}{ROLE_TOKENS['assistant']} {answer}"


def chat(rng: random.Random) -> str:
    """One or two turns in the chat format, mostly with a system prompt before them."""
    turns = [place_question(rng) if rng.random() < 0.85 else rng.choice(SMALL_TALK) for _ in range(rng.randint(1, 2))]
    text = END_OF_TEXT.join(chat_turn(question, answer) for question, answer in turns)
    system = f"{ROLE_TOKENS['system']} {rng.choice(SYSTEM_PROMPTS)}" if rng.random() < 0.7 else ""
    return system + text


# How often each kind of text document is drawn; `train_demo.py` adds the repetitions.
DOCUMENT_WEIGHTS: dict[Callable[[random.Random], str], float] = {
    single_fact: 30,
    fact_list: 8,
    fact_chain: 8,
    description: 8,
    geography: 3,
    gift_story: 30,
    bystander_story: 2,
    errand_story: 5,
    mixed_text: 8,
    everyday_text: 4,
    chat: 14,
}


def document(rng: random.Random) -> str:
    """One training document."""
    maker = rng.choices(list(DOCUMENT_WEIGHTS), list(DOCUMENT_WEIGHTS.values()))[0]
    return maker(rng)


def documents(seed: int, count: int) -> Iterator[str]:
    """The first `count` documents of a seed."""
    rng = random.Random(seed)
    return (document(rng) for _ in range(count))


def repeated_tokens(rng: random.Random, tokens: Sequence[int], length: int, copies: int = 2) -> list[int]:
    """`length` tokens drawn uniformly, then the same again until there are `copies` of them."""
    return rng.choices(tokens, k=length) * copies


if __name__ == "__main__":
    for text in documents(seed=0, count=40):
        print(text)
