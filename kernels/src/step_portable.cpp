// Between the products of a decoding step, in plain C++: the oracle of the others, and what machines without AVX2 run.
#define HCX_STEP_BODY
#include "step.h"

namespace hcx {
const StepSet kStepPortable = kStep;
}
