"""Class names for prompts, and class orders that no seed draws, by the label ids of the Hub's copies."""


def _names(text: str) -> tuple[str, ...]:
    return tuple(" ".join(text.split()).split(", "))


def _ids(text: str) -> tuple[int, ...]:
    return tuple(int(label) for label in text.split())


# The names of the Hub's copy, with class 26 spelt right ("cra" there).
CIFAR100_NAMES = _names("""
apple, aquarium fish, baby, bear, beaver, bed, bee, beetle, bicycle, bottle, bowl, boy, bridge, bus, butterfly,
camel, can, castle, caterpillar, cattle, chair, chimpanzee, clock, cloud, cockroach, couch, crab, crocodile, cup,
dinosaur, dolphin, elephant, flatfish, forest, fox, girl, hamster, house, kangaroo, keyboard, lamp, lawn mower,
leopard, lion, lizard, lobster, man, maple tree, motorcycle, mountain, mouse, mushroom, oak tree, orange, orchid,
otter, palm tree, pear, pickup truck, pine tree, plain, plate, poppy, porcupine, possum, rabbit, raccoon, ray,
road, rocket, rose, sea, seal, shark, shrew, skunk, skyscraper, snail, snake, spider, squirrel, streetcar,
sunflower, sweet pepper, table, tank, telephone, television, tiger, tractor, train, trout, tulip, turtle, wardrobe,
whale, willow tree, wolf, woman, worm
""")

# iCaRL's own order (Rebuffi et al., CVPR 2017), as in MoE-Adapters4CL's cil/class_orders/cifar100.yaml.
CIFAR100_ICARL_ORDER = _ids("""
87 0 52 58 44 91 68 97 51 15 94 92 10 72 49 78 61 14 8 86 84 96 18 24 32 45 88 11 4 67 69 66 77 47 79 93 29 50 57 83
17 81 41 12 37 59 25 20 80 73 1 28 6 46 62 82 53 9 31 75 38 63 33 74 27 22 36 3 16 21 60 19 70 90 89 43 5 42 65 76 40
30 23 85 2 95 56 48 71 64 98 13 99 7 34 55 54 26 35 39
""")

# By WordNet id (n01443537, n01629819, …), as the Hub's copies sort them. The names are those of CLIP's ImageNet
# prompts, as in MoE-Adapters4CL's cil/dataset_reqs/tinyimagenet_classes.txt.
TINY_IMAGENET_NAMES = _names("""
goldfish, fire salamander, American bullfrog, tailed frog, American alligator, boa constrictor, trilobite, scorpion,
southern black widow, tarantula, centipede, goose, koala, jellyfish, brain coral, snail, slug, sea slug, American
lobster, spiny lobster, black stork, king penguin, albatross, dugong, Chihuahua, Yorkshire Terrier, Golden Retriever,
Labrador Retriever, German Shepherd Dog, Standard Poodle, tabby cat, Persian cat, Egyptian Mau, cougar, lion, brown
bear, ladybug, fly, bee, grasshopper, stick insect, cockroach, praying mantis, dragonfly, monarch butterfly, sulphur
butterfly, sea cucumber, guinea pig, pig, ox, bison, bighorn sheep, gazelle, arabian camel, orangutan, chimpanzee,
baboon, African bush elephant, red panda, abacus, academic gown, altar, apron, backpack, baluster / handrail,
barbershop, barn, barrel, basketball, bathtub, station wagon, lighthouse, beaker, beer bottle, bikini, binoculars,
birdhouse, bow tie, brass memorial plaque, broom, bucket, high-speed train, butcher shop, candle, cannon, cardigan,
automated teller machine, CD player, chain, storage chest, Christmas stocking, cliff dwelling, computer keyboard,
candy store, convertible, construction crane, dam, desk, dining table, drumstick, dumbbell, flagpole, fountain,
freight car, frying pan, fur coat, gas mask or respirator, go-kart, gondola, hourglass, iPod, rickshaw, kimono,
lampshade, lawn mower, lifeboat, limousine, magnetic compass, maypole, military uniform, miniskirt, moving van, metal
nail, neck brace, obelisk, oboe, pipe organ, parking meter, payphone, picket fence, pill bottle, plunger, pole, police
van, poncho, soda bottle, potter's wheel, missile, punching bag, fishing casting reel, refrigerator, remote control,
rocking chair, rugby ball, sandal, school bus, scoreboard, sewing machine, snorkel, sock, sombrero, space heater,
spider web, sports car, through arch bridge, stopwatch, sunglasses, suspension bridge, swim trunks / shorts, syringe,
teapot, teddy bear, thatched roof, torch, tractor, triumphal arch, trolleybus, turnstile, umbrella, vestment, viaduct,
volleyball, water jug, water tower, wok, wooden spoon, comic book, plate, guacamole, ice cream, popsicle, pretzel,
mashed potatoes, cauliflower, bell pepper, mushroom, orange, lemon, banana, pomegranate, meatloaf, pizza, pot pie,
espresso, mountain, cliff, coral reef, lakeshore, beach, acorn
""")

# MoE-Adapters4CL's cil/class_orders/tinyimagenet.yaml: line numbers of the dataset's wnids.txt there, sorted ids here.
TINY_IMAGENET_ORDER = _ids("""
31 40 0 112 161 138 144 72 128 71 68 87 86 12 99 170 69 57 122 188 131 74 62 96 108 89 92 56 153 156 47 27 91 44 13
114 173 70 42 48 105 184 23 2 189 82 16 182 39 93 67 139 169 9 63 34 90 88 155 159 160 58 174 6 98 195 141 166 118 149
179 132 196 171 140 172 45 64 101 35 17 21 190 135 150 143 59 55 75 4 178 164 111 25 180 54 3 11 119 73 38 81 19 115
20 126 146 136 104 28 193 194 15 176 26 187 157 43 24 129 5 151 124 181 137 134 36 94 10 52 14 18 85 60 117 53 7 183
123 125 78 116 162 152 113 197 65 41 191 106 163 97 175 32 33 192 142 102 145 199 66 37 80 8 103 107 77 84 148 133 50
177 49 83 168 198 165 46 100 158 121 51 109 61 76 22 147 1 186 110 167 120 95 79 154 30 127 185 29 130
""")

# CLIP's names for EuroSAT, in the dataset's own order (AnnualCrop, Forest, …), as in ZSCL.
EUROSAT_NAMES = _names("""
annual crop land, forest, brushland or shrubland, highway or road, industrial buildings or commercial buildings,
pasture land, permanent crop land, residential buildings or homes or apartments, river, lake or sea
""")

# torchvision's names, as in ZSCL.
MNIST_NAMES = _names("""
0 - zero, 1 - one, 2 - two, 3 - three, 4 - four, 5 - five, 6 - six, 7 - seven, 8 - eight, 9 - nine
""")

# Prompt ensembles of CLIP (Radford et al. 2021, data/prompts.md), as in ZSCL's mtil/src/datasets.
_OF_A_KIND = (
    "a photo of {article} {{}}.",
    "a blurry photo of {article} {{}}.",
    "a black and white photo of {article} {{}}.",
    "a low contrast photo of {article} {{}}.",
    "a high contrast photo of {article} {{}}.",
    "a bad photo of {article} {{}}.",
    "a good photo of {article} {{}}.",
    "a photo of {article} small {{}}.",
    "a photo of {article} big {{}}.",
)
CIFAR_PROMPTS = tuple(prompt.format(article=article) for article in ("a", "the") for prompt in _OF_A_KIND)

_OF_A_CALTECH_KIND = (
    "a photo of {a} {{}}.",
    "a painting of {a} {{}}.",
    "{plain} plastic {{}}.",
    "a sculpture of {a} {{}}.",
    "a sketch of {a} {{}}.",
    "a tattoo of {a} {{}}.",
    "{plain} toy {{}}.",
    "a rendition of {a} {{}}.",
    "{plain} embroidered {{}}.",
    "{plain} cartoon {{}}.",
    "{plain} {{}} in a video game.",
    "{plain} plushie {{}}.",
    "{plain} origami {{}}.",
    "art of {a} {{}}.",
    "graffiti of {a} {{}}.",
    "a drawing of {a} {{}}.",
    "a doodle of {a} {{}}.",
)
CALTECH_PROMPTS = tuple(
    prompt.format(a=article, plain=article) for article in ("a", "the") for prompt in _OF_A_CALTECH_KIND
)
