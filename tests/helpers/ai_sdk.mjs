// The AI SDK as its documentation uses it, for tests/test_real_clients.py: node ai_sdk.mjs ADDRESS IMAGE
// run in build/clients, where `make test-clients` installs it. Prints one JSON object.
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";
const require = createRequire(process.cwd() + "/");
const load = (name) => import(pathToFileURL(require.resolve(name)).href);
const { generateObject, generateText, streamText } = await load("ai");
const { createOpenAI } = await load("@ai-sdk/openai");
const { createOpenAICompatible } = await load("@ai-sdk/openai-compatible");
const { z } = await load("zod");

const [address, image] = process.argv.slice(2);
const baseURL = `${address}/v1`;
const openai = createOpenAI({ baseURL, apiKey: "none" });
const compatible = createOpenAICompatible({ name: "llava", baseURL, supportsStructuredOutputs: true });
const messages = [
  { role: "user", content: [{ type: "image", image }, { type: "text", text: "What is this?" }] },
];
const found = {};
for (const [name, model] of [
  ["compatible", compatible("tiny")],
  ["chat", openai.chat("tiny")],
  ["response", openai.responses("tiny")],
]) {
  const settings = { model, messages, maxOutputTokens: 8, maxRetries: 0 };
  found[name] = (await generateText(settings)).text;
  let text = "";
  for await (const piece of streamText(settings).textStream) text += piece;
  found[`${name} stream`] = text;
  const schema = z.object({ red: z.boolean() });
  found[`${name} parsed`] = (await generateObject({ model, messages, schema, maxRetries: 0 })).object;
}
console.log(JSON.stringify(found));
