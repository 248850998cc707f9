// Between the products of a decoding step, in AVX-512.
#define HCX_STEP_BODY
#include "step.h"

namespace hcx {
const StepSet kStepAvx512 = kStep;
}
