// Copyright 2026 The RBI authors. All rights reserved.
// SPDX-License-Identifier: Apache-2.0
//
// Classifies images with exported models in the pipeline of transformers.js, and prints the predictions as JSON.
//
//     node classify.mjs '[{"folder": "export", "images": ["a.png"], "batches": [["a.png", "b.png"]], "dtype": "q8"}]'
//
// For each request, the output has the predictions for each single image and for each batch:
// {single: [[{label, score}, ...], ...], together: ...}. Without a dtype, transformers.js uses the config's.

import path from 'node:path';

import { env, pipeline } from '@huggingface/transformers';

env.allowRemoteModels = false;

const results = [];
for (const { folder, images = [], batches = [], dtype = null } of JSON.parse(process.argv[2])) {
    env.localModelPath = path.dirname(path.resolve(folder));
    const classifier = await pipeline('image-classification', path.basename(folder), { dtype });
    const single = [];
    for (const image of images) {
        single.push(await classifier(image, { top_k: null }));
    }
    const together = [];
    for (const batch of batches) {
        together.push(await classifier(batch, { top_k: null }));
    }
    results.push({ single, together });
}
console.log(JSON.stringify(results));
