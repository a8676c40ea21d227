"""Word lists by subject and by what a question asks for; counting their words is part of how a prompt is worded."""

LEXICON = {
    "negation": "not except never false incorrect least neither nor without cannot",
    "total": "many much total altogether sum combined amount",
    "compute": "calculate compute find determine evaluate solve estimate simplify express obtain",
    "compare": (
        "more less fewer greater larger smaller than older younger longer shorter taller twice thrice double "
        "triple times half quarter third"
    ),
    "rate": "each every per apiece rate daily weekly monthly hourly",
    "change": (
        "left remaining remain rest remainder after before then first next another additional extra again "
        "initially originally"
    ),
    "money": (
        "dollars dollar cents cost costs price prices pay pays paid earn earns earned spend spends spent sell "
        "sells sold buy buys bought save saved money profit discount"
    ),
    "time": "hours hour minutes minute seconds days day weeks week months month years year",
    "fraction": "percent percentage fraction ratio average mean median proportion",
    "condition": "if suppose assume given let assuming provided unless when",
    "why": "why because explain describe cause reason best likely primarily",
    "which": "which following statement statements true correct",
    "passage": "according refers passage argument author text above",
    "law": (
        "court defendant plaintiff statute contract law jury trial evidence liable crime constitutional state "
        "police murder property landowner"
    ),
    "medicine": (
        "patient disease clinical blood treatment symptoms physician syndrome cells muscle nerve bone "
        "infection year old examination therapy"
    ),
    "physics": (
        "force mass velocity energy pressure temperature current voltage charge magnetic electric field wave "
        "frequency speed acceleration gas heat m s kg j k"
    ),
    "chemistry": "reaction acid molecule molar solution ion electron atom bond ph oxidation mol hydrogen",
    "mathematics": (
        "function integer integers polynomial group ring matrix vector probability equation theorem prime "
        "divisor triangle circle angle real number numbers positive value graph field"
    ),
    "logic": "valid invalid premise conclusion logical implies proposition fallacy iff",
    "economics": "market demand supply price cost income tax bank firm economic monopoly inflation interest",
    "computing": "algorithm program memory network data computer bit bits processor tree complexity instruction",
    "history": "war century revolution empire king government treaty colonial american british president",
    "psychology": ("psychology behavior cognitive social child development theory freud stimulus memory personality"),
    "philosophy": "moral philosophy ethics kant mill utilitarian virtue god belief wrong morally",
    "biology": "gene dna protein species cell evolution plant population organism enzyme",
    "code": (
        "def return for in while if else elif len append range str int list dict print class import none true false"
    ),
    "mutation": (
        "append pop sort reverse insert remove extend update replace join split strip count index find upper "
        "lower isalpha isdigit startswith endswith items keys values copy sorted reversed enumerate zip"
    ),
    "loop": "for while",
    "latex": (
        "\\frac \\sqrt \\cdot \\times \\le \\ge \\leq \\geq \\pi \\sin \\cos \\tan \\log \\sum "
        "\\angle \\triangle \\circ "
        "\\text "
        "\\begin \\left \\right \\dots \\pmod \\binom \\mathbf \\overline \\cdots"
    ),
    "geometry": (
        "triangle circle square rectangle area perimeter radius diameter side sides length angle degrees "
        "volume sphere asy draw \\angle \\triangle \\overline"
    ),
    "counting": ("ways arrangements probability choose random randomly distinct dice coin cards permutations many"),
    "writing": (
        "write compose draft email essay story poem blog letter imagine pretend create generate design "
        "outline summarize rewrite edit role act you your"
    ),
    "person": "he she they his her their him them",
}
