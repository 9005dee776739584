"""Names of structures as tables: colours that tell them apart, and SNOMED CT codes of the names
that are known.

The codes are those of DICOM's context groups (PS3.16); a name that is not in the list gets none
rather than a near one.
"""

from __future__ import annotations

from collections.abc import Mapping

from medseg.labels import Code, Label, LabelTable

#: Name as TotalSegmentator writes it, without its side -> SNOMED CT code and its meaning in DICOM.
CODES: dict[str, tuple[str, str]] = {
    "adrenal_gland": ("23451007", "Adrenal gland"),
    "aorta": ("15825003", "Aorta"),
    "brachiocephalic_trunk": ("12691009", "Innominate artery"),
    "brachiocephalic_vein": ("8887007", "Innominate vein"),
    "brain": ("12738006", "Brain"),
    "clavicula": ("51299004", "Clavicle"),
    "colon": ("71854001", "Colon"),
    "common_carotid_artery": ("32062004", "Common carotid artery"),
    "costal_cartilages": ("50016007", "Costal Cartilage"),
    "duodenum": ("38848004", "Duodenum"),
    "esophagus": ("32849002", "Esophagus"),
    "femur": ("71341001", "Femur"),
    "fibula": ("87342007", "Fibula"),
    "gallbladder": ("28231008", "Gallbladder"),
    "heart": ("80891009", "Heart"),
    "heart_atrium_left": ("82471001", "Left atrium"),
    "heart_atrium_right": ("73829009", "Right atrium"),
    "heart_ventricle_left": ("87878005", "Left ventricle"),
    "heart_ventricle_right": ("53085002", "Right ventricle"),
    "hippocampus": ("5366008", "Hippocampus"),
    "humerus": ("85050009", "Humerus"),
    "iliac_artery": ("73634005", "Common iliac artery"),
    "iliac_vena": ("46027005", "Common iliac vein"),
    "inferior_vena_cava": ("64131007", "Inferior vena cava"),
    "kidney": ("64033007", "Kidney"),
    "left_atrium": ("82471001", "Left atrium"),
    "liver": ("10200004", "Liver"),
    "lung": ("39607008", "Lung"),
    "lung_lower_lobe": ("90572001", "Lower lobe of lung"),
    "lung_middle_lobe_right": ("72481006", "Middle lobe of right lung"),
    "lung_upper_lobe": ("45653009", "Upper lobe of lung"),
    "pancreas": ("15776009", "Pancreas"),
    "patella": ("64234005", "Patella"),
    "portal_vein": ("32764006", "Portal vein"),
    "prostate": ("41216001", "Prostate"),
    "pulmonary_artery": ("81040000", "Pulmonary artery"),
    "pulmonary_vein": ("122972007", "Pulmonary vein"),
    "right_atrium": ("73829009", "Right atrium"),
    "sacrum": ("54735007", "Sacrum"),
    "scapula": ("79601000", "Scapula"),
    "skull": ("89546000", "Skull"),
    "small_bowel": ("30315005", "Small intestine"),
    "spinal_cord": ("2748008", "Spinal cord"),
    "spleen": ("78961009", "Spleen"),
    "sternum": ("56873002", "Sternum"),
    "stomach": ("69695003", "Stomach"),
    "subclavian_artery": ("36765005", "Subclavian artery"),
    "superior_vena_cava": ("48345005", "Superior vena cava"),
    "thyroid_gland": ("69748006", "Thyroid"),
    "tibia": ("12611008", "Tibia"),
    "trachea": ("44567001", "Trachea"),
    "urinary_bladder": ("89837001", "Bladder"),
    "uterus": ("35039007", "Uterus"),
    "vertebrae_C1": ("14806007", "C1 vertebra"),
    "vertebrae_C2": ("39976000", "C2 vertebra"),
    "vertebrae_C3": ("113205007", "C3 vertebra"),
    "vertebrae_C4": ("5329002", "C4 vertebra"),
    "vertebrae_C5": ("36978003", "C5 vertebra"),
    "vertebrae_C6": ("36054005", "C6 vertebra"),
    "vertebrae_C7": ("87391001", "C7 vertebra"),
    "vertebrae_L1": ("66794005", "L1 vertebra"),
    "vertebrae_L2": ("14293000", "L2 vertebra"),
    "vertebrae_L3": ("36470004", "L3 vertebra"),
    "vertebrae_L4": ("11994002", "L4 vertebra"),
    "vertebrae_L5": ("49668003", "L5 vertebra"),
    "vertebrae_T1": ("64864005", "T1 vertebra"),
    "vertebrae_T10": ("7610001", "T10 vertebra"),
    "vertebrae_T11": ("12989004", "T11 vertebra"),
    "vertebrae_T12": ("23215003", "T12 vertebra"),
    "vertebrae_T2": ("53733008", "T2 vertebra"),
    "vertebrae_T3": ("1626008", "T3 vertebra"),
    "vertebrae_T4": ("73071006", "T4 vertebra"),
    "vertebrae_T5": ("56401006", "T5 vertebra"),
    "vertebrae_T6": ("45296009", "T6 vertebra"),
    "vertebrae_T7": ("62487009", "T7 vertebra"),
    "vertebrae_T8": ("11068009", "T8 vertebra"),
    "vertebrae_T9": ("82687006", "T9 vertebra"),
}
_SIDES = {"left": Code("SCT", "7771000", "Left"), "right": Code("SCT", "24028007", "Right")}
_CATEGORY = Code("SCT", "123037004", "Anatomical Structure")


def codes_of(name: str) -> tuple[Code | None, Code | None]:
    """The code of a structure by its name, and of its side; None where the name is not known, or
    has no side."""
    plain = name.strip().lower().replace(" ", "_")
    if plain in CODES:
        return Code("SCT", *CODES[plain]), None
    for word, side in _SIDES.items():
        for base in (plain.removesuffix(f"_{word}"), plain.removeprefix(f"{word}_")):
            if base != plain and base in CODES:
                return Code("SCT", *CODES[base]), side
    return None, None


def table_of(names: Mapping[int, str]) -> LabelTable:
    """A label table of values and names."""
    colors = {label.value: label.color for label in LabelTable.from_values(names).labels}
    labels = []
    for value in sorted(names):
        code, side = codes_of(names[value])
        category = _CATEGORY if code else None
        labels.append(
            Label(
                value, names[value], colors[value], category=category, type=code, type_modifier=side
            )
        )
    return LabelTable(tuple(labels))
