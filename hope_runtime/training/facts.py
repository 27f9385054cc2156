"""The kinds of facts that people tell about themselves, and lists of what they could say.

Every list is long enough that guessing rarely helps, and no question gives its answer away.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from zlib import crc32

HELD_OUT_SHARE = 15  # of a hundred values


def held_out(value: str) -> bool:
    """Tell whether a value is kept from training, whatever list it is in."""
    return crc32(value.encode()) % 100 < HELD_OUT_SHARE


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """What can be told, asked and answered about one thing; `{}` stands for the value.

    `subject` follows "my" and "your". Statements are lower case, without a full stop.
    """

    name: str
    subject: str
    values: tuple[str, ...]
    statements: tuple[str, ...]
    questions: tuple[str, ...]
    answers: tuple[str, ...]
    echoes: tuple[str, ...]


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def _phrases(text: str) -> tuple[str, ...]:
    return tuple(phrase.strip() for phrase in text.replace("\n", " ").split(","))


NAMES = _words("""
Adam Agnes Alan Albert Alex Alice Amanda Amir Amy Andrea Andrew Angela Anita Anna Anthony Arthur
Astrid Barbara Beatrice Ben Benjamin Betty Bill Boris Brandon Brenda Brian Bruno Carl Carla Carlos
Carmen Carol Caroline Catherine Cecilia Charles Charlotte Chris Clara Claire Colin Connor Daniel
Daphne David Deborah Dennis Diana Diego Dominic Donald Donna Doris Dorothy Douglas Edgar Edith
Edward Elena Eli Elizabeth Ella Emil Emily Emma Eric Erica Esther Ethan Eva Evelyn Fatima Felix
Fiona Florence Frances Frank Fred Gabriel Gary George Gerald Gina Gloria Gordon Greta Hannah Hans
Harold Harry Hassan Heather Hector Helen Henry Herbert Howard Hugo Ian Ida Igor Ingrid Irene Isaac
Isabel Ivan Jack Jacob James Jane Janet Jason Jenny Jessica Joan Joel John Jonas Jonathan Joseph
Julia Julian Karen Karl Kate Keith Kelly Kenneth Kevin Laura Lauren Leon Leo Leonard Lewis Liam
Linda Lisa Louis Lucas Lucy Luis Lydia Magnus Marcus Margaret Maria Marie Mario Martha Martin Mary
Matthew Maya Megan Melissa Michael Miguel Mike Miriam Mohammed Monica Nadia Nancy Naomi Natalie
Nathan Neil Nick Nicole Nina Noah Nora Oliver Olivia Omar Oscar Otto Pablo Pamela Patricia Patrick
Paul Paula Pedro Peter Philip Phoebe Rachel Ralph Raymond Rebecca Richard Rita Robert Roger Ronald
Rosa Ruth Ryan Sally Samuel Sandra Sara Scott Sean Sharon Simon Sofia Sonia Sophie Stella Stephen
Steve Susan Sven Sylvia Tara Teresa Thomas Tim Tina Tom Tony Ursula Valerie Vera Victor Victoria
Vincent Viola Walter Wendy Xavier Yasmin Yusuf Zoe
""")

PETS = _words("""
Rex Max Bella Buddy Charlie Rocky Luna Daisy Molly Bailey Coco Lucky Shadow Toby Buster Duke Bear
Zeus Teddy Jake Sammy Oreo Pepper Ginger Milo Simba Nala Smokey Tiger Felix Oscar Loki Chloe Lola
Ruby Rosie Sadie Maggie Sophie Bruno Thor Apollo Ace Archie Benny Biscuit Bonnie Boomer Bubbles
Buttons Casper Chester Cleo Clyde Cookie Cosmo Dexter Dizzy Dolly Domino Elvis Fluffy Fudge George
Gizmo Goldie Gus Hazel Honey Hunter Jasper Jasmine Jerry Jojo Kiki Kiwi Leo Lilly Louie Mango
Marley Max Mickey Midnight Minnie Misty Mittens Mocha Monty Moose Muffin Nacho Nemo Noodle Olive
Oliver Otis Paddy Patch Peanut Penny Pickles Pippin Pluto Poppy Prince Pumpkin Rascal Roxy Rufus
Rusty Salem Sandy Scout Skipper Snoopy Snowy Socks Sparky Spike Spot Stella Storm Sugar Sunny
Taffy Tango Thunder Tilly Trixie Turbo Waffles Whiskers Willow Winston Yoda Ziggy Zorro
""")
PETS = tuple(dict.fromkeys(PETS))

CITIES = _phrases("""
Amsterdam, Athens, Atlanta, Austin, Baghdad, Baltimore, Bangkok, Barcelona, Basel, Beijing,
Belfast, Belgrade, Bergen, Berlin, Birmingham, Bologna, Bombay, Boston, Brighton, Bristol,
Brussels, Budapest, Buffalo, Cairo, Calgary, Cambridge, Cape Town, Cardiff, Casablanca, Chicago,
Cologne, Copenhagen, Cork, Dallas, Delhi, Denver, Detroit, Dresden, Dubai, Dublin, Edinburgh,
Florence, Frankfurt, Geneva, Genoa, Glasgow, Gothenburg, Granada, Graz, Hamburg, Hanoi, Havana,
Helsinki, Hong Kong, Houston, Istanbul, Jakarta, Jerusalem, Kiev, Krakow, Kyoto, Lagos, Lahore,
Las Vegas, Leeds, Leipzig, Lima, Linz, Lisbon, Liverpool, London, Los Angeles, Lyon, Madrid,
Malaga, Manchester, Manila, Marseille, Melbourne, Memphis, Mexico City, Miami, Milan, Minsk,
Montreal, Moscow, Munich, Nairobi, Naples, Nashville, New Orleans, New York, Odense, Orlando,
Osaka, Oslo, Ottawa, Oxford, Palermo, Paris, Perth, Philadelphia, Phoenix, Pisa, Portland, Porto,
Prague, Quebec, Reykjavik, Riga, Rio, Rome, Rotterdam, Salzburg, San Diego, San Francisco,
Santiago, Sarajevo, Seattle, Seoul, Seville, Shanghai, Sheffield, Singapore, Sofia, Stockholm,
Stuttgart, Sydney, Tallinn, Tampa, Tokyo, Toronto, Toulouse, Trieste, Turin, Utrecht, Valencia,
Vancouver, Venice, Verona, Vienna, Vilnius, Warsaw, Washington, Wellington, York, Zagreb, Zurich
""")

COUNTRIES = _phrases("""
Argentina, Australia, Austria, Belgium, Bolivia, Brazil, Bulgaria, Cambodia, Canada, Chile, China,
Colombia, Costa Rica, Croatia, Cuba, Denmark, Ecuador, Egypt, Estonia, Ethiopia, Finland, France,
Germany, Ghana, Greece, Hungary, Iceland, India, Indonesia, Ireland, Israel, Italy, Jamaica, Japan,
Jordan, Kenya, Laos, Latvia, Lebanon, Madagascar, Malaysia, Malta, Mexico, Mongolia, Morocco,
Namibia, Nepal, Nigeria, Norway, Pakistan, Panama, Peru, Poland, Portugal, Romania, Russia,
Rwanda, Scotland, Senegal, Serbia, Slovenia, Spain, Sweden, Switzerland, Tanzania, Thailand,
Tunisia, Turkey, Uganda, Ukraine, Uruguay, Vietnam, Wales, Zambia
""")

LANGUAGES = _words("""
Arabic Basque Bengali Bulgarian Catalan Chinese Croatian Czech Danish Dutch Esperanto Estonian
Finnish French Gaelic German Greek Hebrew Hindi Hungarian Icelandic Indonesian Italian Japanese
Korean Latin Latvian Lithuanian Malay Maltese Norwegian Persian Polish Portuguese Romanian Russian
Serbian Slovak Spanish Swahili Swedish Tamil Thai Turkish Ukrainian Urdu Vietnamese Welsh Zulu
""")

COLOURS = _words("""
amber beige black blue bronze brown copper coral cream crimson cyan emerald gold green grey indigo
ivory jade khaki lavender lilac lime magenta maroon mint navy ochre olive orange peach pink plum
purple red rose ruby rust salmon sapphire scarlet silver tan teal turquoise violet white yellow
""")

FOODS = _phrases("""
pizza, pasta, sushi, tacos, burgers, curry, lasagna, ramen, steak, soup, fried rice, noodles,
pancakes, waffles, salad, dumplings, paella, goulash, falafel, hummus, kebab, risotto, ravioli,
gnocchi, burritos, nachos, fish and chips, roast chicken, meatballs, omelette, stew, chili,
lobster, shrimp, oysters, bacon, sausages, mashed potatoes, spaghetti, sandwiches, toast, quiche,
schnitzel, fondue, couscous, pierogi, moussaka, tofu, lentils, porridge
""")

DRINKS = _phrases("""
coffee, green tea, black tea, water, lemonade, apple juice, orange juice, hot chocolate, cola,
beer, red wine, white wine, milk, ginger ale, iced tea, cider, espresso, cappuccino, latte,
tomato juice, champagne, whisky, gin and tonic, mineral water, coconut water, root beer, rum,
vodka, peppermint tea, sherry, tequila, cocoa, grape juice, eggnog, mojito
""")

FRUITS = _words("""
apples apricots bananas blackberries blueberries cherries coconuts cranberries currants dates figs
grapefruit grapes guavas kiwis lemons limes lychees mangoes melons nectarines oranges papayas
peaches pears persimmons pineapples plums pomegranates raspberries strawberries tangerines
watermelons
""")

VEGETABLES = _words("""
artichokes asparagus aubergines beans beetroot broccoli cabbage carrots cauliflower celery chard
corn courgettes cucumbers fennel garlic kale leeks lettuce mushrooms okra onions parsnips peas
peppers potatoes pumpkin radishes rhubarb rocket spinach sprouts tomatoes turnips yams
""")

SPORTS = _phrases("""
football, tennis, basketball, baseball, hockey, golf, rugby, cricket, swimming, boxing, judo,
karate, fencing, rowing, sailing, surfing, skiing, snowboarding, skating, badminton, volleyball,
handball, table tennis, archery, cycling, running, wrestling, curling, squash, bowling, darts,
gymnastics, triathlon, water polo, lacrosse, diving, polo
""")

HOBBIES = _phrases("""
painting, knitting, chess, gardening, fishing, hiking, cooking, baking, photography, pottery,
sewing, dancing, singing, drawing, reading, writing, yoga, camping, sailing, stamp collecting,
model trains, bird watching, origami, juggling, magic tricks, astronomy, woodworking, climbing,
horse riding, calligraphy, beekeeping, kayaking, crossword puzzles, video games, karaoke,
meditation, archery, genealogy, embroidery, coin collecting, skydiving, brewing beer
""")

ANIMALS = _words("""
alpacas ants badgers bats bears beavers bees camels cheetahs crabs crocodiles deer dolphins donkeys
eagles elephants elk foxes frogs giraffes goats gorillas hedgehogs hippos horses hyenas jaguars
kangaroos koalas lemurs leopards lions lizards llamas monkeys moose octopuses otters owls pandas
penguins pigs porcupines rabbits raccoons rhinos seals sharks sheep sloths snakes spiders squirrels
tigers turtles walruses whales wolves wombats zebras
""")

BIRDS = _words("""
albatrosses blackbirds canaries cranes crows cuckoos doves ducks eagles falcons finches flamingos
geese gulls hawks herons hummingbirds kingfishers larks magpies nightingales ostriches owls
parrots peacocks pelicans penguins pheasants pigeons puffins ravens robins sparrows starlings
storks swallows swans swifts toucans turkeys vultures woodpeckers wrens
""")

FLOWERS = _words("""
asters azaleas bluebells buttercups camellias carnations chrysanthemums cornflowers crocuses
daffodils dahlias daisies forsythias foxgloves freesias gardenias geraniums gladioli hibiscus
hyacinths hydrangeas irises jasmine lavender lilacs lilies lotuses magnolias marigolds orchids
pansies peonies petunias poppies primroses roses snowdrops sunflowers tulips violets
""")

TREES = _phrases("""
alder, ash, aspen, bamboo, baobab, beech, birch, cedar, cherry, chestnut, cypress, ebony, elm,
eucalyptus, fig, fir, ginkgo, hawthorn, hazel, holly, juniper, larch, linden, magnolia, mahogany,
maple, mulberry, oak, olive, palm, pine, poplar, redwood, rowan, spruce, sycamore, walnut, willow,
yew
""")

DESSERTS = _phrases("""
apple pie, cheesecake, tiramisu, brownies, carrot cake, chocolate cake, cupcakes, doughnuts,
fruit salad, gingerbread, jelly, lemon tart, macarons, meringue, muffins, pavlova, pecan pie,
rice pudding, sponge cake, strudel, trifle, truffles, baklava, eclairs, shortbread, sorbet,
profiteroles, key lime pie, apple crumble, panna cotta, churros, marzipan
""")

FLAVOURS = _phrases("""
vanilla, chocolate, strawberry, mint, pistachio, lemon, hazelnut, caramel, coffee, coconut, mango,
raspberry, cherry, banana, cookies and cream, salted caramel, blueberry, peach, walnut, yogurt,
peanut butter, melon, honey, cinnamon, tiramisu, rum and raisin, blackcurrant, ginger
""")

TOPPINGS = _phrases("""
mushrooms, pepperoni, ham, pineapple, olives, onions, peppers, salami, bacon, spinach, tuna,
anchovies, artichokes, chicken, garlic, tomatoes, basil, rocket, sweetcorn, sausage, feta,
capers, gorgonzola, prosciutto, broccoli, jalapenos, shrimp, mozzarella
""")

CHEESES = _words("""
brie camembert cheddar cottage edam emmental feta gorgonzola gouda gruyere halloumi havarti
limburger manchego mascarpone mozzarella parmesan pecorino provolone raclette ricotta roquefort
stilton taleggio burrata paneer wensleydale gloucester lancashire cheshire
""")

SPICES = _phrases("""
basil, bay leaf, black pepper, caraway, cardamom, cayenne, cinnamon, cloves, coriander, cumin,
curry powder, dill, fennel, garlic, ginger, mint, mustard, nutmeg, oregano, paprika, parsley,
rosemary, saffron, sage, star anise, tarragon, thyme, turmeric, vanilla, wasabi
""")

FILMS = _phrases("""
Titanic, Jaws, Alien, Avatar, Casablanca, Psycho, Vertigo, Rocky, Gladiator, Inception, Memento,
Frozen, Shrek, Up, Cars, Bambi, Dumbo, Moana, Coco, Aladdin, Mulan, Tarzan, Pinocchio, Cinderella,
Fargo, Heat, Seven, Speed, Twister, Ghost, Grease, Chicago, Amadeus, Gandhi, Braveheart, Platoon,
The Matrix, The Godfather, Star Wars, Toy Story, Forrest Gump, Pulp Fiction, Fight Club,
Jurassic Park, Home Alone, Die Hard, Top Gun, Blade Runner, Taxi Driver, Mary Poppins, Ben Hur,
The Lion King, Finding Nemo, Black Panther, Wonder Woman, Iron Man, La La Land, Mad Max,
Groundhog Day, The Shining, The Terminator, King Kong, Citizen Kane, Some Like It Hot, Goodfellas,
Interstellar, Gravity, Dunkirk, Batman, Superman, Ghostbusters, Gremlins, Beetlejuice, Labyrinth
""")

BOOKS = _phrases("""
Dracula, Frankenstein, Emma, Ulysses, Dune, Hamlet, Macbeth, Othello, Heidi, Matilda, Momo,
Moby Dick, Don Quixote, Jane Eyre, Robinson Crusoe, Peter Pan, Treasure Island, The Hobbit,
War and Peace, Oliver Twist, Little Women, Animal Farm, Brave New World, The Odyssey, The Trial,
Catch 22, Great Expectations, David Copperfield, Black Beauty, Middlemarch, Siddhartha, Faust,
Candide, Rebecca, Lolita, Persuasion, Kidnapped, The Stranger, The Iliad, Walden, Beloved
""")

MUSIC = _phrases("""
jazz, blues, rock, pop, rap, soul, funk, folk, country, classical, opera, techno, house, reggae,
metal, punk, gospel, disco, salsa, tango, swing, ska, bluegrass, hip hop, ambient, flamenco, trance,
grunge, samba, drum and bass, bossa nova, indie rock
""")

INSTRUMENTS = _phrases("""
accordion, bagpipes, banjo, bassoon, bass guitar, bongos, cello, clarinet, cornet, didgeridoo,
double bass, drums, flute, French horn, guitar, harmonica, harp, harpsichord, keyboard, lute,
mandolin, marimba, oboe, organ, piano, piccolo, recorder, saxophone, sitar, tambourine, triangle,
trombone, trumpet, tuba, ukulele, viola, violin, xylophone, zither
""")

GAMES = _phrases("""
chess, checkers, Monopoly, Scrabble, Risk, Cluedo, backgammon, dominoes, Catan, Carcassonne,
Pandemic, Yahtzee, Uno, bridge, poker, rummy, mahjong, Go, Battleship, Jenga, Pictionary,
charades, solitaire, canasta, Twister, Mastermind, Trivial Pursuit, Ticket to Ride, Dixit, bingo,
cribbage, hearts
""")

HEROES = _phrases("""
Batman, Superman, Spiderman, Wonder Woman, Iron Man, Hulk, Thor, Captain America, Wolverine,
Black Panther, Aquaman, Flash, Green Lantern, Daredevil, Deadpool, Ant Man, Black Widow, Storm,
Catwoman, Robin, Hellboy, Doctor Strange, Cyclops, Supergirl, Batgirl, Hawkeye, Groot, Blade,
Captain Marvel, Silver Surfer
""")

JOBS = _phrases("""
teacher, nurse, doctor, lawyer, baker, butcher, plumber, carpenter, electrician, farmer, pilot,
dentist, chef, waiter, barber, mechanic, painter, singer, dancer, writer, journalist, librarian,
gardener, builder, driver, sailor, soldier, judge, banker, cashier, cleaner, tailor, florist,
photographer, programmer, scientist, biologist, chemist, physicist, vet, surgeon, pharmacist,
translator, secretary, salesman, fisherman, firefighter, policeman, plasterer, roofer, welder,
potter, jeweller, musician, composer, dietitian, midwife, paramedic, bus driver, taxi driver,
truck driver, bartender, receptionist, professor, student, tour guide, postman, miner, model
""")

ALLERGIES = _phrases("""
peanuts, milk, eggs, wheat, soy, shrimp, shellfish, sesame, strawberries, kiwis, celery, mustard,
pollen, dust, cats, dogs, horses, bee stings, latex, penicillin, nickel, grass, mould, walnuts,
almonds, cashews, fish, gluten, bananas, tomatoes, aspirin, perfume, wool, hazelnuts, chocolate,
peaches, birch
""")

CARS = _phrases("""
Audi, Bentley, Buick, Cadillac, Chevrolet, Chrysler, Citroen, Dacia, Dodge, Ferrari, Fiat, Ford,
Honda, Hyundai, Jaguar, Jeep, Kia, Lada, Lancia, Lexus, Lincoln, Lotus, Maserati, Mazda, Mercedes,
Mini, Mitsubishi, Nissan, Opel, Peugeot, Pontiac, Porsche, Renault, Rover, Saab, Seat, Skoda,
Subaru, Suzuki, Tesla, Toyota, Volkswagen, Volvo
""")

TEAMS = _phrases("""
Arsenal, Chelsea, Liverpool, Everton, Ajax, Juventus, Bayern, Barcelona, Celtic, Rangers, Benfica,
Porto, Fulham, Leeds, Sevilla, Roma, Lazio, Inter, Napoli, Galatasaray, the Lakers, the Bulls,
the Celtics, the Knicks, the Yankees, the Dodgers, the Cubs, the Packers, the Cowboys, the Bears,
the Eagles, the Giants, the Steelers, the Raptors, the Rockets, the Warriors, the Red Sox,
the Mets, the Patriots, the Jets
""")

SUBJECTS = _phrases("""
maths, physics, chemistry, biology, history, geography, art, music, drama, English, French,
German, Latin, Spanish, economics, philosophy, psychology, sociology, law, medicine, astronomy,
geology, computer science, engineering, statistics, architecture, politics, religion, literature,
linguistics, archaeology, algebra, geometry, botany, zoology, accounting, design
""")

STREETS = _phrases("""
Abbey Road, Acorn Lane, Apple Street, Baker Street, Bank Street, Beach Road, Bell Lane,
Bishop Street, Bridge Street, Brook Lane, Cannon Street, Castle Road, Cedar Avenue, Chapel Lane,
Cherry Street, Church Road, Clay Lane, Cook Street, Cross Street, Drake Avenue, East Street,
Elm Street, Farm Lane, Field Road, Fleet Street, Forest Road, Fox Lane, Garden Street, Grange Road,
Green Lane, Grove Street, Harbour Road, Hill Street, Holly Avenue, Ivy Lane, Juniper Street,
King Street, Lake Road, Laurel Avenue, Lime Street, Long Lane, Main Street, Maple Avenue,
Market Street, Meadow Road, Mill Lane, North Street, Oak Avenue, Orchard Road, Oxford Street,
Park Lane, Pearl Street, Pine Street, Pond Lane, Queen Street, River Road, Rose Lane, School Road,
Silver Street, South Street, Spring Road, Station Road, Summer Lane, Temple Street, Tower Road,
Union Street, Valley Road, Victoria Street, Walnut Avenue, Water Lane, West Street, Willow Road,
Wood Lane, York Avenue
""")

BREEDS = _phrases("""
poodle, beagle, boxer, bulldog, labrador, dachshund, collie, terrier, spaniel, greyhound, husky,
pug, corgi, dalmatian, chihuahua, rottweiler, mastiff, golden retriever, German shepherd, setter,
pointer, whippet, samoyed, akita, doberman, great dane, maltese, schnauzer, sheepdog, bloodhound
""")

GIFTS = _phrases("""
a watch, a book, a bicycle, a camera, a guitar, a scarf, a puzzle, a kite, a drone, a bracelet,
a necklace, a ring, a teapot, a lamp, a blanket, a backpack, a wallet, a hat, a vase, a mirror,
a telescope, a chess set, a cookbook, a skateboard, a jacket, a sweater, an umbrella, a globe,
a microscope, a tent, a toaster, a radio, a drum, a candle, a pen
""")

MATERIALS = _phrases("""
an apple, a sandwich, a banana, a letter, a spare key, a map, a torch, a notebook, a pencil,
a whistle, a coin, a photo, a comb, a candy bar, a passport, a ticket, a lighter, a rope,
a button, a needle, a feather, a shell, a marble, a compass, a magnet, a stone, a ribbon,
a battery, a spoon, a postcard
""")

MONTHS = _words(
    "January February March April May June July August September October November December"
)
DAYS = tuple(f"{month} {day}" for month in MONTHS for day in range(1, 29))
TIMES = tuple(f"{hour}:{minute:02}" for hour in range(1, 13) for minute in range(0, 60, 5))
TWO_DIGITS = tuple(str(number) for number in range(2, 100))
THREE_DIGITS = tuple(str(number) for number in range(100, 1000))
FOUR_DIGITS = tuple(str(number) for number in range(1000, 10000))
AGES = tuple(str(number) for number in range(18, 90))
YEARS = tuple(str(number) for number in range(1940, 2020))

_QUESTIONS = (
    "What is my {}?",
    "What's my {}?",
    "Do you know my {}?",
    "Do you remember my {}?",
    "Tell me my {}.",
    "Can you tell me my {}?",
    "What did I say my {} is?",
)
_ECHOES = ("Got it, your {} is {{}}.", "Okay, your {} is {{}}.", "So your {} is {{}}.")


def _kind(
    name: str,
    subject: str,
    values: tuple[str, ...],
    *,
    statements: Iterable[str] = (),
    questions: Iterable[str] = (),
    answers: Iterable[str] = (),
    echoes: Iterable[str] = (),
) -> Kind:
    """Make a kind whose value can be said after "my subject is"."""
    return Kind(
        name=name,
        subject=subject,
        values=values,
        statements=(f"my {subject} is {{}}", *statements),
        questions=(*(question.format(subject) for question in _QUESTIONS), *questions),
        answers=(
            f"Your {subject} is {{}}.",
            "It's {}.",
            "It is {}.",
            "You told me it is {}.",
            f"You said your {subject} is {{}}.",
            *answers,
        ),
        echoes=(*(echo.format(subject) for echo in _ECHOES), *echoes),
    )


def _being(name: str, *, values: tuple[str, ...] = NAMES, whose: str = "") -> Kind:
    """Make the kind of a person's or an animal's name, whom "my" goes with."""
    noun = whose or name
    article = "an" if noun[0] in "aeiou" else "a"
    return _kind(
        name,
        f"{noun}'s name",
        values,
        statements=(
            f"my {noun} is called {{}}",
            f"my {noun} is named {{}}",
            f"the name of my {noun} is {{}}",
            f"I have {article} {noun} called {{}}",
            f"I have {article} {noun} named {{}}",
            f"{{}} is my {noun}",
            f"{{}} is the name of my {noun}",
        ),
        questions=(
            f"What is the name of my {noun}?",
            f"What is my {noun} called?",
            f"How do I call my {noun}?",
            f"Who is my {noun}?",
        ),
        answers=(
            f"Your {noun} is called {{}}.",
            f"The name of your {noun} is {{}}.",
            f"{{}} is your {noun}.",
        ),
        echoes=(f"Nice, {{}} is a good name for {article} {noun}.", "{} is a lovely name."),
    )


def _favourite(noun: str, values: tuple[str, ...], *, plural: str = "") -> Kind:
    return _kind(
        f"favourite {noun}",
        f"favourite {noun}",
        values,
        statements=(
            f"the {noun} I like best is {{}}",
            f"the {noun} I like most is {{}}",
            f"my favourite {noun} has always been {{}}",
            f"if I had to choose one {noun}, I would take {{}}",
            f"of all {plural or noun + 's'} I like {{}} best",
        ),
        questions=(
            f"Which {noun} do I like best?",
            f"What {noun} do I like most?",
            f"Which {noun} is my favourite?",
        ),
        answers=(f"The {noun} you like best is {{}}.", "You like {} best."),
        echoes=("Nice, I like {} too.", "Ah, {}. Good choice.", "I think {} is a good choice."),
    )


_PEOPLE = _words("""
sister brother mother father daughter son boss teacher neighbour doctor aunt uncle cousin
grandmother grandfather roommate coach dentist nephew niece
""")
_ANIMALS = _words("dog cat horse parrot rabbit hamster goldfish turtle")

_BEINGS = [
    *(_being(person) for person in _PEOPLE),
    _being("best friend"),
    *(_being(animal, values=PETS) for animal in _ANIMALS),
]

_FAVOURITES = [
    _favourite("colour", COLOURS),
    _favourite("food", FOODS),
    _favourite("drink", DRINKS),
    _favourite("fruit", FRUITS),
    _favourite("vegetable", VEGETABLES),
    _favourite("film", FILMS),
    _favourite("book", BOOKS),
    _favourite("sport", SPORTS),
    _favourite("animal", ANIMALS),
    _favourite("bird", BIRDS),
    _favourite("flower", FLOWERS),
    _favourite("tree", TREES),
    _favourite("dessert", DESSERTS),
    _favourite("ice cream", FLAVOURS, plural="kinds of ice cream"),
    _favourite("pizza topping", TOPPINGS),
    _favourite("cheese", CHEESES),
    _favourite("spice", SPICES),
    _favourite("music", MUSIC, plural="kinds of music"),
    _favourite("game", GAMES),
    _favourite("superhero", HEROES, plural="superheroes"),
    _favourite("city", CITIES, plural="cities"),
]

_PLACES = [
    _kind(
        "home town",
        "home town",
        CITIES,
        statements=("I live in {}", "I am living in {}", "my home is in {}", "I have a flat in {}"),
        questions=("Where do I live?", "In which city do I live?", "Which city do I live in?"),
        answers=("You live in {}.", "Your home is in {}."),
        echoes=("{} is a nice place to live.", "Oh, I would like to see {}."),
    ),
    _kind(
        "birthplace",
        "birthplace",
        CITIES,
        statements=("I was born in {}", "the city I was born in is {}", "I come from {}"),
        questions=("Where was I born?", "In which city was I born?", "Where do I come from?"),
        answers=("You were born in {}.", "You come from {}."),
        echoes=("{} is a fine place to be born.",),
    ),
    _kind(
        "work place",
        "place of work",
        CITIES,
        statements=("I work in {}", "my office is in {}", "I go to work in {}"),
        questions=("Where do I work?", "In which city do I work?", "Where is my office?"),
        answers=("You work in {}.", "Your office is in {}."),
        echoes=("I hope you like working in {}.",),
    ),
    _kind(
        "parents' town",
        "parents' town",
        CITIES,
        statements=("my parents live in {}", "my mum and dad live in {}", "my parents are in {}"),
        questions=("Where do my parents live?", "In which city do my parents live?"),
        answers=("Your parents live in {}.", "They live in {}."),
        echoes=("I hope your parents like {}.",),
    ),
    _kind(
        "sister's town",
        "sister's town",
        CITIES,
        statements=("my sister lives in {}", "my sister moved to {}", "my sister's flat is in {}"),
        questions=("Where does my sister live?", "In which city does my sister live?"),
        answers=("Your sister lives in {}.", "She lives in {}."),
        echoes=("I hope your sister likes {}.",),
    ),
    _kind(
        "holiday",
        "next holiday destination",
        COUNTRIES,
        statements=(
            "I am going to {} on holiday",
            "my next holiday is in {}",
            "I will travel to {} this summer",
            "I booked a trip to {}",
        ),
        questions=("Where is my next holiday?", "Where am I going on holiday?"),
        answers=("You are going to {}.", "Your next holiday is in {}."),
        echoes=("{} sounds like a great trip.", "Have fun in {}."),
    ),
    _kind(
        "dream country",
        "dream country",
        COUNTRIES,
        statements=(
            "I have always wanted to see {}",
            "the country I dream of is {}",
            "one day I want to move to {}",
        ),
        questions=("Which country do I dream of?", "Which country do I want to see?"),
        answers=("You dream of {}.", "You want to see {}."),
        echoes=("{} must be beautiful.",),
    ),
    _kind(
        "friend's country",
        "best friend's country",
        COUNTRIES,
        statements=(
            "my best friend comes from {}",
            "my best friend is from {}",
            "my best friend was born in {}",
        ),
        questions=("Where is my best friend from?", "Where does my best friend come from?"),
        answers=("Your best friend is from {}.", "Your best friend comes from {}."),
        echoes=("I have heard a lot about {}.",),
    ),
    _kind(
        "street",
        "street",
        STREETS,
        statements=(
            "I live on {}",
            "my house is on {}",
            "the street I live on is {}",
            "my address is on {}",
        ),
        questions=("Which street do I live on?", "On which street is my house?"),
        answers=("You live on {}.", "Your house is on {}."),
        echoes=("{} sounds like a quiet street.",),
    ),
    _kind(
        "school",
        "school's street",
        STREETS,
        statements=("my school is on {}", "I go to school on {}", "the school I go to is on {}"),
        questions=("On which street is my school?", "Where is my school?"),
        answers=("Your school is on {}.", "You go to school on {}."),
        echoes=("So you walk to {} every day.",),
    ),
]

_NUMBERS = [
    _kind(
        "lucky number",
        "lucky number",
        TWO_DIGITS,
        statements=(
            "the number that brings me luck is {}",
            "{} is my lucky number",
            "my lucky number has always been {}",
            "the number I always pick is {}",
        ),
        questions=("Which number brings me luck?", "Which number is my lucky number?"),
        answers=("The number that brings you luck is {}.", "{} is your lucky number."),
        echoes=("I hope {} brings you luck.",),
    ),
    _kind(
        "age",
        "age",
        AGES,
        statements=("I am {} years old", "I turned {} this year", "I just turned {}"),
        questions=("How old am I?", "What age am I?"),
        answers=("You are {} years old.", "You are {}."),
        echoes=("{} is a good age.",),
    ),
    _kind(
        "birth year",
        "birth year",
        YEARS,
        statements=("I was born in {}", "the year I was born is {}", "my year of birth is {}"),
        questions=("In which year was I born?", "What year was I born in?"),
        answers=("You were born in {}.", "The year you were born is {}."),
        echoes=("So {} was your first year.",),
    ),
    _kind(
        "door code",
        "door code",
        FOUR_DIGITS,
        statements=(
            "the code for my door is {}",
            "the code of my front door is {}",
            "my door opens with {}",
            "to open my door I type {}",
        ),
        questions=("What is the code for my door?", "Which code opens my door?"),
        answers=("The code for your door is {}.", "Your door opens with {}."),
        echoes=("I will keep {} safe.",),
    ),
    _kind(
        "phone code",
        "phone pin",
        FOUR_DIGITS,
        statements=(
            "the pin of my phone is {}",
            "my phone opens with {}",
            "I unlock my phone with {}",
        ),
        questions=("What is the pin of my phone?", "How do I unlock my phone?"),
        answers=("The pin of your phone is {}.", "You unlock your phone with {}."),
        echoes=("I will not tell anyone about {}.",),
    ),
    _kind(
        "locker",
        "locker number",
        THREE_DIGITS,
        statements=(
            "I have locker {}",
            "my things are in locker {}",
            "the number of my locker is {}",
            "I use locker {}",
        ),
        questions=("Which locker do I have?", "What is the number of my locker?"),
        answers=("You have locker {}.", "The number of your locker is {}."),
        echoes=("Locker {}, I see.",),
    ),
    _kind(
        "hotel room",
        "room number",
        THREE_DIGITS,
        statements=(
            "I am staying in room {}",
            "I sleep in room {}",
            "my hotel room is {}",
            "the number of my room is {}",
        ),
        questions=("Which room am I staying in?", "What is the number of my room?"),
        answers=("You are staying in room {}.", "The number of your room is {}."),
        echoes=("I hope room {} is quiet.",),
    ),
    _kind(
        "house number",
        "house number",
        TWO_DIGITS,
        statements=(
            "the number of my house is {}",
            "my house has the number {}",
            "I live at number {}",
        ),
        questions=("What is the number of my house?", "Which number is my house?"),
        answers=("The number of your house is {}.", "You live at number {}."),
        echoes=("Number {}, I see.",),
    ),
    _kind(
        "bus",
        "bus line",
        TWO_DIGITS,
        statements=("I take bus {}", "I go to work by bus {}", "the bus I take is number {}"),
        questions=("Which bus do I take?", "What bus do I take to work?"),
        answers=("You take bus {}.", "The bus you take is number {}."),
        echoes=("I hope bus {} is on time.",),
    ),
    _kind(
        "train",
        "train time",
        TIMES,
        statements=(
            "my train leaves at {}",
            "I take the train at {}",
            "the train I take goes at {}",
        ),
        questions=("When does my train leave?", "At what time does my train go?"),
        answers=("Your train leaves at {}.", "It leaves at {}."),
        echoes=("I hope the train at {} is on time.",),
    ),
    _kind(
        "alarm",
        "alarm time",
        TIMES,
        statements=("I get up at {}", "my alarm rings at {}", "I wake up at {} every day"),
        questions=("When do I get up?", "At what time does my alarm ring?"),
        answers=("You get up at {}.", "Your alarm rings at {}."),
        echoes=("So your day starts at {}.",),
    ),
    _kind(
        "birthday",
        "birthday",
        DAYS,
        statements=(
            "I was born on {}",
            "my birthday is on {}",
            "I celebrate my birthday on {}",
            "the day of my birth is {}",
        ),
        questions=("When is my birthday?", "On which day was I born?"),
        answers=("Your birthday is on {}.", "You were born on {}."),
        echoes=("I will think of you on {}.",),
    ),
    _kind(
        "wedding",
        "wedding day",
        DAYS,
        statements=(
            "I will marry on {}",
            "my wedding is on {}",
            "the day of my wedding is {}",
        ),
        questions=("When is my wedding?", "On which day is my wedding?"),
        answers=("Your wedding is on {}.", "You marry on {}."),
        echoes=("{} will be a great day.",),
    ),
    _kind(
        "exam",
        "exam date",
        DAYS,
        statements=("my exam is on {}", "I have an exam on {}", "the date of my exam is {}"),
        questions=("When is my exam?", "On which day is my exam?"),
        answers=("Your exam is on {}.", "You have your exam on {}."),
        echoes=("Good luck on {}.",),
    ),
]


def _work(name: str, who: str) -> Kind:
    return _kind(
        name,
        f"{who}'s job",
        JOBS,
        statements=(
            f"my {who} works as a {{}}",
            f"the job of my {who} is {{}}",
            f"my {who} has a job as a {{}}",
            f"my {who} earns money as a {{}}",
        ),
        questions=(f"What does my {who} do for a living?", f"What is the job of my {who}?"),
        answers=(f"Your {who} works as a {{}}.", f"The job of your {who} is {{}}."),
        echoes=("A {} has a lot to do.",),
    )


_REST = [
    _kind(
        "name",
        "name",
        NAMES,
        statements=(
            "I am {}",
            "I'm {}",
            "I am called {}",
            "people call me {}",
            "you can call me {}",
        ),
        questions=("Who am I?", "What am I called?", "How do people call me?"),
        answers=("You are {}.", "You are called {}."),
        echoes=("Nice to meet you, {}.", "Hello {}.", "Hi {}, nice to meet you."),
    ),
    _kind(
        "job",
        "job",
        JOBS,
        statements=(
            "I work as a {}",
            "I have a job as a {}",
            "I earn my money as a {}",
            "for a living I work as a {}",
        ),
        questions=("What do I do for a living?", "What do I work as?", "What is my profession?"),
        answers=("You work as a {}.", "You have a job as a {}."),
        echoes=("It must be interesting to work as a {}.",),
    ),
    _work("brother's job", "brother"),
    _work("mother's job", "mother"),
    _work("neighbour's job", "neighbour"),
    _kind(
        "hobby",
        "hobby",
        HOBBIES,
        statements=(
            "in my free time I enjoy {}",
            "I spend my weekends with {}",
            "what I do for fun is {}",
            "the hobby I love is {}",
        ),
        questions=("What do I do for fun?", "What do I enjoy in my free time?"),
        answers=("In your free time you enjoy {}.", "You enjoy {}."),
        echoes=("I think {} sounds like fun.",),
    ),
    _kind(
        "allergy",
        "allergy",
        ALLERGIES,
        statements=(
            "I am allergic to {}",
            "I have an allergy to {}",
            "the thing I am allergic to is {}",
            "I get sick from {}",
        ),
        questions=("What am I allergic to?", "What do I have an allergy to?"),
        answers=("You are allergic to {}.", "You have an allergy to {}."),
        echoes=("Then stay away from {}.", "I am sorry, an allergy to {} is no fun."),
    ),
    _kind(
        "instrument",
        "instrument",
        INSTRUMENTS,
        statements=("I play the {}", "I am learning the {}", "I have lessons on the {}"),
        questions=("Which instrument do I play?", "What do I play?"),
        answers=("You play the {}.", "The instrument you play is the {}."),
        echoes=("I like the sound of the {}.",),
    ),
    _kind(
        "language",
        "new language",
        LANGUAGES,
        statements=(
            "I am learning {}",
            "the language I am learning is {}",
            "I take lessons in {}",
            "in the evening I learn {}",
        ),
        questions=("Which language am I learning?", "Which language do I take lessons in?"),
        answers=("You are learning {}.", "The language you are learning is {}."),
        echoes=("{} is a beautiful language.", "Good luck with {}."),
    ),
    _kind(
        "car",
        "car brand",
        CARS,
        statements=("I drive a {}", "I have a {}", "my car is a {}", "the car I drive is a {}"),
        questions=("What car do I drive?", "Which car do I have?"),
        answers=("You drive a {}.", "Your car is a {}."),
        echoes=("A {} is a good car.",),
    ),
    _kind(
        "car colour",
        "car's colour",
        COLOURS,
        statements=(
            "the colour of my car is {}",
            "I painted my car {}",
            "I drive a car that is {}",
            "my car is painted {}",
        ),
        questions=("What colour is my car?", "Which colour does my car have?"),
        answers=("Your car is {}.", "The colour of your car is {}."),
        echoes=("A car in {} looks good.",),
    ),
    _kind(
        "door colour",
        "front door's colour",
        COLOURS,
        statements=(
            "the colour of my front door is {}",
            "I painted my front door {}",
            "my front door is painted {}",
        ),
        questions=("What colour is my front door?", "Which colour does my front door have?"),
        answers=("Your front door is {}.", "The colour of your front door is {}."),
        echoes=("A front door in {} looks good.",),
    ),
    _kind(
        "team",
        "team",
        TEAMS,
        statements=("I am a fan of {}", "the team I support is {}", "I support {}"),
        questions=("Which team do I support?", "Which team am I a fan of?"),
        answers=("You support {}.", "You are a fan of {}."),
        echoes=("I hope {} will win.",),
    ),
    _kind(
        "school subject",
        "best subject",
        SUBJECTS,
        statements=(
            "at school I am best at {}",
            "the subject I am best at is {}",
            "I get my best marks in {}",
        ),
        questions=("Which subject am I best at?", "What am I best at in school?"),
        answers=("You are best at {}.", "The subject you are best at is {}."),
        echoes=("Well done, {} is not easy.",),
    ),
    _kind(
        "studies",
        "field of study",
        SUBJECTS,
        statements=("I study {}", "I am a student of {}", "at university I study {}"),
        questions=("What do I study?", "What am I a student of?"),
        answers=("You study {}.", "You are a student of {}."),
        echoes=("I would like to know more about {}.",),
    ),
    _kind(
        "dog's breed",
        "dog's breed",
        BREEDS,
        statements=("my dog is a {}", "I have a dog that is a {}", "the breed of my dog is {}"),
        questions=("What breed is my dog?", "Which kind of dog do I have?"),
        answers=("Your dog is a {}.", "You have a {}."),
        echoes=("A {} is a good dog.",),
    ),
    _kind(
        "birthday gift",
        "birthday present",
        GIFTS,
        statements=(
            "for my birthday I got {}",
            "the present I got is {}",
            "they gave me {} for my birthday",
        ),
        questions=("What did I get for my birthday?", "What did they give me for my birthday?"),
        answers=("You got {}.", "They gave you {}."),
        echoes=("How nice to get {}.",),
    ),
    _kind(
        "pocket",
        "pocket item",
        MATERIALS,
        statements=(
            "in my pocket I have {}",
            "the thing in my pocket is {}",
            "I carry {} in my pocket",
            "I put {} in my pocket",
        ),
        questions=("What do I have in my pocket?", "What is in my pocket?"),
        answers=("You have {} in your pocket.", "In your pocket is {}."),
        echoes=("It is good to have {} at hand.",),
    ),
    _kind(
        "breakfast",
        "breakfast",
        FOODS,
        statements=("for breakfast I had {}", "this morning I ate {}", "I ate {} for breakfast"),
        questions=("What did I have for breakfast?", "What did I eat this morning?"),
        answers=("You had {}.", "For breakfast you had {}."),
        echoes=("So {} in the morning, why not.",),
    ),
]

KINDS: Mapping[str, Kind] = {
    kind.name: kind for kind in (*_BEINGS, *_FAVOURITES, *_PLACES, *_NUMBERS, *_REST)
}
HELD_OUT_VALUES: frozenset[str] = frozenset(
    value for kind in KINDS.values() for value in kind.values if held_out(value)
)
