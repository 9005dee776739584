"""The Hounsfield windows, lengths and labels of `ct-tissues`, each with its source."""

from __future__ import annotations

from medseg.labels import Code, Label, LabelTable

#: Below: air, or tissue that holds more air than anything else. About half-way between lung
#: (-850 HU) or gas (-1000 HU) and soft tissue.
AIR_BELOW = -500
#: Fat, from and to: Mitsiopoulos et al. 1998, J Appl Physiol 85:115; Kvist et al. 1988, Am J Clin
#: Nutr 48:1351.
FAT = (-190, -30)
#: Muscle, from and to: Mitsiopoulos et al. 1998. Organs, blood and fluid have the same values.
MUSCLE = (-29, 150)
#: Bone from here; trabecular bone has 100 to 400 HU, and marrow is filled in.
BONE_FROM = 200
#: The rind of real bones reaches this in blocks of 3 mm; contrast medium seldom does.
CORTICAL_FROM = 450
#: Metal from here: the top of 12 bits, which enamel alone comes near.
METAL_FROM = 3000
#: Emphysema: the share of a lung below this (Gevenois et al. 1996, Am J Respir Crit Care Med
#: 154:187).
EMPHYSEMA_BELOW = -950
#: What is below is as empty as the air around a patient.
EMPTY_BELOW = -950
#: Values outside are those of padding and of metal.
CLIP = (-1024, 3071)

LEFT_LUNG, RIGHT_LUNG, AIRWAYS, BONE = 1, 2, 3, 4
SUBCUTANEOUS_FAT, VISCERAL_FAT, OTHER_FAT, MUSCLE_LABEL = 5, 6, 7, 8
SOFT_TISSUE, GAS, METAL = 9, 10, 11
LUNGS = (LEFT_LUNG, RIGHT_LUNG)

_STRUCTURE = Code("SCT", "123037004", "Anatomical Structure")
_TISSUE = Code("SCT", "85756007", "Tissue")
_LUNG = Code("SCT", "39607008", "Lung")
_FAT = Code("SCT", "55603005", "Fat")


def _tissue(value: int, name: str, color: tuple[int, int, int], kind: Code) -> Label:
    return Label(value, name, color, category=_TISSUE, type=kind)


#: What `ct-tissues` finds. All labels together are the body.
TISSUES = LabelTable(
    (
        Label(
            LEFT_LUNG,
            "left lung",
            (172, 138, 200),
            category=_STRUCTURE,
            type=_LUNG,
            type_modifier=Code("SCT", "7771000", "Left"),
        ),
        Label(
            RIGHT_LUNG,
            "right lung",
            (197, 165, 145),
            category=_STRUCTURE,
            type=_LUNG,
            type_modifier=Code("SCT", "24028007", "Right"),
        ),
        Label(
            AIRWAYS,
            "airways",
            (182, 228, 255),
            category=_STRUCTURE,
            type=Code("SCT", "89187006", "Airway structure"),
        ),
        _tissue(BONE, "bone", (241, 214, 145), kind=Code("SCT", "3138006", "Bone")),
        Label(
            SUBCUTANEOUS_FAT,
            "subcutaneous fat",
            (230, 220, 70),
            category=_TISSUE,
            type=_FAT,
            region=Code("SCT", "71966008", "Subcutaneous tissue"),
        ),
        _tissue(VISCERAL_FAT, "visceral fat", (235, 150, 60), kind=_FAT),
        _tissue(OTHER_FAT, "other fat", (190, 180, 110), kind=_FAT),
        _tissue(
            MUSCLE_LABEL, "muscle", (192, 104, 88), kind=Code("SCT", "127954009", "Skeletal muscle")
        ),
        _tissue(
            SOFT_TISSUE,
            "other soft tissue",
            (150, 98, 83),
            kind=Code("SCT", "87784001", "Soft tissue"),
        ),
        Label(
            GAS,
            "gas",
            (60, 160, 160),
            category=Code("SCT", "91720002", "Body Substance"),
            type=Code("SCT", "74947009", "Gas"),
        ),
        Label(
            METAL,
            "metal",
            (200, 200, 210),
            category=Code("SCT", "260787004", "Physical object"),
            type=Code("SCT", "40388003", "Implant"),
        ),
    )
)
