"""Every file of the data: its SHA-256, the public files that it comes from, and its recipe."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.real.building import measured, taught
from benchmarks.real.building.lines import Texts

COMMITS = {
    "AGI-Edgerunners/LLM-Adapters": "816657208af4db747803f87ba40a4c71383fed7a",
    "BunsenFeng/model_collaboration": "ecea545acdd3f49e9f9fa46a6dedcb076ed476b1",
    "GITenberg/Cranford_394": "4403af75adc5b140f21f0786f408a64dae8d4e71",
    "Jometeorie/KnowledgeSpread": "51d7402617c2e52bde0dc11b76e400c3725a181a",
    "PolyAI-LDN/task-specific-datasets": "57ec275d8078af65b7731c2a98be812d844a6d6b",
    "RubriksCube/rubriks_cube": "45e617d6ca9e5a158a280f0da0f7a44f7c8dbb8c",
    "ShishirPatil/gorilla": "6ea57973c7a6097fd7c5915698c54c17c5b1b6c8",
    "TurkuNLP/oasst-fi": "45e9c4600eacf5844887e321ba3952befe9727dc",
    "UniversalDependencies/UD_Chinese-PUD": "2849afd946a8c01b3e9acdf3e7afa8670cf2777d",
    "UniversalDependencies/UD_German-PUD": "ff80846ae60a0a70fc4d6251ef73e6a483a620ee",
    "alexwarstadt/blimp": "3e56b06fcabca9b30822fc66435fca6b1aa40bb1",
    "amir-zeldes/gum": "72ce5ac14978a324c2fd18d49484e65292cbe316",
    "evandez/relations": "1b9ec3cf2b8368e42bde7e80fcef384312a6ec07",
    "google-research-datasets/dstc8-schema-guided-dialogue": (
        "e852981ae34990f4358979625854259302feaa78"
    ),
    "hiyouga/LLaMA-Factory": "ff6d4d12eeb035d6ce06805a5733dd7b29f2ac30",
    "lab-paper-code/dual_path_attribution": "411720aaa63c1b479ad425d3b950f55d04d72918",
    "openai/grade-school-math": "3101c7d5072418e28b9008a6636bde82a006892c",
    "pallets/click": "2c8cd3ac958a7eb316d67f2d316c27086c4c0369",
    "psf/requests": "1f6589ec3a1ee910f9a65cc3ceac60b26677bc0e",
    "scalable-model-editing/unified-model-editing": "23d72b560e52992e675377cc2d1deed7a45b1cd0",
    "sonos/nlu-benchmark": "b86ac7f1577868c42158d0dec77db50956046696",
    "ybisk/ybisk.github.io": "21edab439af693b961be2f069e8690a88d3b4e37",
    "yizhongw/self-instruct": "0b26ccaa415992100fa32df62d41b994cf928e23",
}


@dataclass(frozen=True)
class File:
    """A file of the data.

    Attributes:
        sha256: of the file that the results were measured with.
        recipe: {path: text} of the sources, in their order -> the file's text.
        sources: (repository, path) pairs; the commit is in `COMMITS`.
    """

    sha256: str
    recipe: Callable[[Texts], str]
    sources: tuple[tuple[str, str], ...]


def _from(repository: str, *patterns: str, names: str = "") -> tuple[tuple[str, str], ...]:
    """The paths of a repository; with `names`, every pattern with every name for its {}."""
    filled = (p.format(name) for name in names.split() for p in patterns)
    return tuple((repository, path) for path in (filled if names else patterns))


_BLIMP = """
adjunct_island anaphor_gender_agreement anaphor_number_agreement animate_subject_passive
animate_subject_trans causative complex_NP_island
coordinate_structure_constraint_complex_left_branch
coordinate_structure_constraint_object_extraction determiner_noun_agreement_1
determiner_noun_agreement_2 determiner_noun_agreement_irregular_1
determiner_noun_agreement_irregular_2 determiner_noun_agreement_with_adj_2
determiner_noun_agreement_with_adj_irregular_1 determiner_noun_agreement_with_adj_irregular_2
determiner_noun_agreement_with_adjective_1 distractor_agreement_relational_noun
distractor_agreement_relative_clause drop_argument ellipsis_n_bar_1 ellipsis_n_bar_2
existential_there_object_raising existential_there_quantifiers_1 existential_there_quantifiers_2
existential_there_subject_raising expletive_it_object_raising inchoative intransitive
irregular_past_participle_adjectives irregular_past_participle_verbs
irregular_plural_subject_verb_agreement_1 irregular_plural_subject_verb_agreement_2
left_branch_island_echo_question left_branch_island_simple_question
matrix_question_npi_licensor_present npi_present_1 npi_present_2 only_npi_licensor_present
only_npi_scope passive_1 passive_2 principle_A_c_command principle_A_case_1 principle_A_case_2
principle_A_domain_1 principle_A_domain_2 principle_A_domain_3 principle_A_reconstruction
regular_plural_subject_verb_agreement_1 regular_plural_subject_verb_agreement_2
sentential_negation_npi_licensor_present sentential_negation_npi_scope
sentential_subject_island superlative_quantifiers_1 superlative_quantifiers_2
tough_vs_raising_1 tough_vs_raising_2 transitive wh_island wh_questions_object_gap
wh_questions_subject_gap wh_questions_subject_gap_long_distance wh_vs_that_no_gap
wh_vs_that_no_gap_long_distance wh_vs_that_with_gap wh_vs_that_with_gap_long_distance
"""
_RELATIONS = """
commonsense/fruit_inside_color commonsense/fruit_outside_color commonsense/object_superclass
commonsense/substance_phase commonsense/task_done_by_person commonsense/task_done_by_tool
commonsense/word_sentiment commonsense/work_location factual/city_in_country factual/company_ceo
factual/company_hq factual/country_capital_city factual/country_currency factual/country_language
factual/country_largest_city factual/food_from_country factual/landmark_in_country
factual/landmark_on_continent factual/person_band_lead_singer factual/person_father
factual/person_mother factual/person_native_language factual/person_occupation
factual/person_plays_instrument factual/person_plays_position_in_sport
factual/person_plays_pro_sport factual/person_university factual/pokemon_evolutions
factual/presidents_birth_year factual/presidents_election_year factual/product_by_company
factual/star_constellation factual/superhero_archnemesis factual/superhero_person
linguistic/adj_antonym linguistic/adj_comparative linguistic/adj_superlative
linguistic/verb_past_tense linguistic/word_first_letter linguistic/word_last_letter
"""
_NEWS = """
interview_ants interview_brotherhood interview_chomsky interview_cocktail interview_cyclone
interview_daly interview_dungeon interview_gaming interview_herrick interview_hill
interview_libertarian interview_licen interview_mcguire interview_mckenzie interview_messina
interview_onion interview_peres interview_shalev interview_stardust news_afghan news_asylum
news_clock news_crane news_defector news_election news_expo news_flag news_hackers
news_homeopathic news_ie9 news_imprisoned news_iodine news_korea news_lanterns news_nasa
news_questionnaire news_sensitive news_soccer news_stampede news_taxes news_warhol news_warming
news_worship
"""
_INTENTS = """
AddToPlaylist BookRestaurant GetWeather PlayMusic RateBook SearchCreativeWork SearchScreeningEvent
"""
_CALLS = _from(
    "ShishirPatil/gorilla",
    "berkeley-function-call-leaderboard/bfcl_eval/data/BFCL_v4_{}.json",
    "berkeley-function-call-leaderboard/bfcl_eval/data/possible_answer/BFCL_v4_{}.json",
    names="simple_python multiple parallel parallel_multiple live_simple live_multiple"
    " live_parallel live_parallel_multiple",
)
_EDITS = "data/counterfact/counterfact-{}.json"
_ENGINES = "2017-06-custom-intent-engines/{0}/"

FILES = {
    "mc_arc_easy_test.jsonl": File(
        "78b6344c3c1b7e1e4fa9358bc72f46b2094701467f25ce531716c483dc75e89f",
        measured.arc_easy,
        _from("AGI-Edgerunners/LLM-Adapters", "dataset/ARC-Easy/test.json"),
    ),
    "mc_piqa_valid.jsonl": File(
        "6203de6e995323dd674501500d3a2a752bcd8fa4d1fead42449c48de3a12b974",
        measured.piqa,
        _from("ybisk/ybisk.github.io", "piqa/data/valid.jsonl", "piqa/data/valid-labels.lst"),
    ),
    "mc_hellaswag_1000.jsonl": File(
        "c0abad3e94c3ba4a6385af0620eeb1cba85810313a7759d43c80ddfa6394f1a1",
        measured.hellaswag,
        _from("RubriksCube/rubriks_cube", "data/hellaswag.jsonl"),
    ),
    "mc_blimp_40x67.jsonl": File(
        "794ad49782f211b8fa05efe5d02108aa083aa227b8fdf5a2c2c8beb3a1b8f02b",
        measured.blimp,
        _from("alexwarstadt/blimp", "data/{}.jsonl", names=_BLIMP),
    ),
    "facts_relations.jsonl": File(
        "f13dbdc2b904dc39fd2e1a2b9a4a64fb795ba0fc4e873ba1c1277782d0f55b65",
        measured.relations,
        _from("evandez/relations", "data/{}.json", names=_RELATIONS),
    ),
    "facts_known_1000.jsonl": File(
        "be74a68b6f39cb1cd5d03495304c810ded57964133a34a3d1e76e0c068ba78e5",
        measured.known,
        _from("lab-paper-code/dual_path_attribution", "data/known_1000.json")
        + _from("Jometeorie/KnowledgeSpread", _EDITS, names="edit val"),
    ),
    "text_wikipedia_en.txt": File(
        "ade7e66206b229a06f509408c25d54ebe6c746058b1b5e89c5fcd6f4ad2cd4bb",
        measured.wikipedia,
        _from("hiyouga/LLaMA-Factory", "data/wiki_demo.txt"),
    ),
    "text_web_c4.txt": File(
        "227a1e8b0bf38236727f0e8067924df994c8edfd60e0c1e7ad292330f0440c26",
        measured.web,
        _from("hiyouga/LLaMA-Factory", "data/c4_demo.jsonl"),
    ),
    "text_news_wikinews.txt": File(
        "cb1670103c9cf74db23210a294d2a36266d52539410c4d4cdfd11a06a274d547",
        measured.news,
        _from("amir-zeldes/gum", "dep/GUM_{}.conllu", names=_NEWS),
    ),
    "text_fiction_cranford.txt": File(
        "52d4b84ff44587b701819b1f3ee41c2be1cb2642e55795e05abfc4c28d42957a",
        measured.cranford,
        _from("GITenberg/Cranford_394", "394-0.txt"),
    ),
    "text_code_python.txt": File(
        "35372326b2318a95ae09d1afbcff4fdd8ba2073d1cf18b3d73786fba044925f0",
        measured.code,
        _from("psf/requests", "src/requests/{}.py", names="models sessions")
        + _from("pallets/click", "src/click/{}.py", names="types termui"),
    ),
    "text_de_pud.txt": File(
        "b3334a75152e3dae66e30c22ca64884ac1dea2fac3bdb0611a047cb45406e2b0",
        measured.sentences,
        _from("UniversalDependencies/UD_German-PUD", "de_pud-ud-test.conllu"),
    ),
    "text_zh_pud.txt": File(
        "08b8258f235f48d9880b4fc392b89ce81f7f8f8d7b6819f1a12fdd35d8d283fb",
        measured.sentences,
        _from("UniversalDependencies/UD_Chinese-PUD", "zh_pud-ud-test.conllu"),
    ),
    "text_math_gsm8k.txt": File(
        "72a25155f09e715910934b2330cb0d9f9f873966614111ffdc5b17900367ce7f",
        measured.problems,
        _from("openai/grade-school-math", "grade_school_math/data/test.jsonl"),
    ),
    "text_dialogue_sgd.txt": File(
        "4f29fc5c3458550fe475332970d26f220c276c08f9b8966b2e94b1cf65a3d066",
        measured.service,
        _from(
            "google-research-datasets/dstc8-schema-guided-dialogue",
            "test/dialogues_{}.json",
            names="002 003",
        ),
    ),
    "chat_oasst1_en_valid.jsonl": File(
        "1e163415d618a41bcd46e7e4f09ff51dd1fe2582d80e4fd97931f2c701b1a05d",
        measured.oasst,
        _from("TurkuNLP/oasst-fi", "original-data/en-validation.jsonl"),
    ),
    "chat_userinstr_252.jsonl": File(
        "eda96ef41efc77e13d72d2fc7db0cc0c62955d8d8d90a7447b78159608b82782",
        measured.instructions,
        _from("yizhongw/self-instruct", "human_eval/user_oriented_instructions.jsonl"),
    ),
    "fc_bfcl_train.jsonl": File(
        "9a72eec079aaea337f2c4f6fa50a546830d094974a7d3f3f7df61b6d429131e4",
        taught.bfcl_train,
        _CALLS,
    ),
    "fc_bfcl_test.jsonl": File(
        "cdaa53e2f4f0df8f1a90b8586f676c27256a389ebdbbadf9437739818babea55", taught.bfcl_test, _CALLS
    ),
    "cls_banking77_train.jsonl": File(
        "0ab0549d42996788cdb10e11fb975d0ad2527497c8594b776a030198e10274a9",
        taught.banking,
        _from("PolyAI-LDN/task-specific-datasets", "banking_data/train.csv"),
    ),
    "cls_banking77_test.jsonl": File(
        "649607fa7b124293c80b455d2effe5e41da713e1836ee936073fe34ab9dc6fba",
        taught.banking,
        _from("PolyAI-LDN/task-specific-datasets", "banking_data/test.csv"),
    ),
    "cls_snips_train.jsonl": File(
        "839e1f5d849e3f0ba67816ef60e5c4d9158fb3cf04455aa970440436abe5c2c4",
        taught.snips,
        _from("sonos/nlu-benchmark", _ENGINES + "train_{0}.json", names=_INTENTS),
    ),
    "cls_snips_test.jsonl": File(
        "64221f115d48414049107c728f36720e196937535dbb3ac16977a4918e22c266",
        taught.snips,
        _from("sonos/nlu-benchmark", _ENGINES + "validate_{0}.json", names=_INTENTS),
    ),
    "math_gsm8k_train_2000.jsonl": File(
        "8e929ec983d7b86602220032a4e2828e61fcf2d73b8315d61e564993d5b63e42",
        taught.gsm8k_2000,
        _from("openai/grade-school-math", "grade_school_math/data/train.jsonl"),
    ),
    "math_gsm8k_test.jsonl": File(
        "752adc99f23132275139f1f7be57126b08735a55daf0c56859ee6df70abafbac",
        taught.gsm8k,
        _from("openai/grade-school-math", "grade_school_math/data/test.jsonl"),
    ),
    "newfacts_counterfact_2000.jsonl": File(
        "3a509d6027210da20241a3769c9451b73bf3b6b796ddaa2d3df2e8d9b610d884",
        taught.counterfact,
        _from("Jometeorie/KnowledgeSpread", _EDITS.format("edit"))
        + _from("scalable-model-editing/unified-model-editing", "data/counterfact_qna.json"),
    ),
    "newfacts_wikidyk.jsonl": File(
        "a789bf0b8c4420440b56348ce2ba6788784f5654a17004009123a40fc9e1ef17",
        taught.wikidyk,
        _from("BunsenFeng/model_collaboration", "model_collaboration/data/wikidyk.json"),
    ),
}
