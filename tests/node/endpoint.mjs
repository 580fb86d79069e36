// Copyright 2026 The RBI authors. All rights reserved.
// SPDX-License-Identifier: Apache-2.0

// Sends requests to an endpoint through @huggingface/inference, and prints the responses as JSON:
//     node endpoint.mjs ADDRESS IMAGE BROKEN_IMAGE

import { readFile } from "node:fs/promises";

import { imageClassification } from "@huggingface/inference";

const [address, imagePath, brokenPath] = process.argv.slice(2);
const [image, broken] = await Promise.all([imagePath, brokenPath].map((path) => readFile(path)));

function asBlob(file, type = "image/png") {
    return new Blob([file], { type });
}

// The client sends `inputs` as the whole body and never sends `parameters` beside an image.
function asJson(file, parameters) {
    const body = { inputs: file.toString("base64"), parameters };
    return new Blob([JSON.stringify(body)], { type: "application/json" });
}

async function ask(inputs, query = "") {
    try {
        return { answer: await imageClassification({ endpointUrl: address + query, inputs }) };
    } catch (error) {
        return { error: error.message, status: error.httpResponse?.status };
    }
}

const results = {
    plain: await ask(asBlob(image)),
    bytes: await ask(asBlob(image, "application/octet-stream")),
    query: await ask(asBlob(image), "/?top_k=2&function_to_apply=sigmoid"),
    json: await ask(asJson(image, { top_k: 2, function_to_apply: "sigmoid" })),
    broken_json: await ask(asJson(broken, { top_k: 2 })),
    broken_bytes: await ask(asBlob(broken, "application/octet-stream")),
    wrong_top_k: await ask(asBlob(image), "/?top_k=0"),
    too_large: await ask(asBlob(Buffer.alloc(5_000_000))),
};
console.log(JSON.stringify(results));
