// Calls of npm packages against a server of this project, as clients.py has those of Python's: openai, ai with its providers, ollama, Anthropic's.
//   node clients.mjs URL PACKAGE CASE     (in a folder below which the packages are, or with NODE_PATH's like: see record_clients.py)
//   node clients.mjs --list
import assert from "node:assert";
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";
import { deflateSync } from "node:zlib";

const CHAT = "smollm2-135m-q4_1", TOOLS = "qwen2.5-coder-0.5b-q4_k_m", SEES = "demo-q8_0";
const RIVER = [{ role: "user", content: "Name a river." }], STORY = [{ role: "user", content: "Write a long story about a river." }];
const ASKED = [{ role: "user", content: "What is the weather in Paris? Use the tool." }], BOB = [{ role: "user", content: "Bob is 5 years old." }];
const CITY = { type: "object", properties: { city: { type: "string", maxLength: 20 } }, required: ["city"], additionalProperties: false };
const WEATHER = { type: "function", function: { name: "get_weather", description: "Get the weather of a city.", parameters: CITY } };
const BY_NAME = { type: "function", function: { name: "get_weather" } };

const [url, packageName, caseName] = process.argv.slice(2);
const home = createRequire(pathToFileURL((process.env.CLIENTS_HOME ?? process.cwd()) + "/"));
const load = async name => import(pathToFileURL(home.resolve(name)));
const sleep = ms => new Promise(done => setTimeout(done, ms));

async function working() {
  const text = await (await fetch(url + "/metrics")).text();
  return text.split("\n").some(line => line.startsWith("pyengine_requests_running{") && !line.endsWith(" 0.0"));
}

async function comesToRest() {
  for (let i = 0; await working(); i++) {
    assert(i < 60, "the server still works for a client that has left");
    await sleep(50);
  }
}

function square(size = 56) {
  const table = Array.from({ length: 256 }, (_, n) => { for (let k = 0; k < 8; k++) n = n & 1 ? 0xedb88320 ^ (n >>> 1) : n >>> 1; return n >>> 0; });
  const crc = bytes => ~bytes.reduce((c, b) => table[(c ^ b) & 255] ^ (c >>> 8), -1) >>> 0;
  const word = n => { const b = Buffer.alloc(4); b.writeUInt32BE(n); return b; };
  const chunk = (kind, content) => { const both = Buffer.concat([Buffer.from(kind), content]); return Buffer.concat([word(content.length), both, word(crc(both))]); };
  const inside = n => n >= size / 4 && n < 3 * size / 4, rows = [];
  for (let y = 0; y < size; y++) { rows.push(0); for (let x = 0; x < size; x++) rows.push(...(inside(x) && inside(y) ? [208, 16, 16] : [255, 255, 255])); }
  const head = Buffer.concat([word(size), word(size), Buffer.from([8, 2, 0, 0, 0])]);
  return Buffer.concat([Buffer.from([137, 80, 78, 71, 13, 10, 26, 10]), chunk("IHDR", head), chunk("IDAT", deflateSync(Buffer.from(rows))), chunk("IEND", Buffer.alloc(0))]);
}

async function openai() {
  const { default: OpenAI } = await load("openai");
  return new OpenAI({ baseURL: url + "/v1", apiKey: "none", maxRetries: 0 });
}

async function ai() {
  const [sdk, own, compatible, zod] = await Promise.all(["ai", "@ai-sdk/openai", "@ai-sdk/openai-compatible", "zod"].map(load));
  globalThis.AI_SDK_LOG_WARNINGS = false;
  const first = own.createOpenAI({ baseURL: url + "/v1", apiKey: "none" });
  const second = compatible.createOpenAICompatible({ name: "pyengine", baseURL: url + "/v1", supportsStructuredOutputs: true, includeUsage: true });
  const kinds = { chat: name => first.chat(name), responses: name => first(name), compatible: name => second(name) };
  const person = zod.z.object({ name: zod.z.string().max(10), age: zod.z.number().int().min(0).max(150) });
  const weather = sdk.tool({ description: "Get the weather of a city.", inputSchema: zod.z.object({ city: zod.z.string().max(20) }), execute: async ({ city }) => ({ city, degrees: 18 }) });
  return { ...sdk, kinds, first, second, person, tools: { get_weather: weather } };
}

const few = { temperature: 0, maxOutputTokens: 16, maxRetries: 0 }, more = { ...few, maxOutputTokens: 60 };
const firstByName = async ({ stepNumber }) => ({ toolChoice: stepNumber == 0 ? { type: "tool", toolName: "get_weather" } : "auto" });

const cases = {
  openai: {
    async chat() {
      const client = await openai(), asked = { model: CHAT, messages: RIVER, max_tokens: 8, temperature: 0 };
      const whole = await client.chat.completions.create(asked);
      let text = "", usage;
      for await (const piece of await client.chat.completions.create({ ...asked, stream: true, stream_options: { include_usage: true } })) {
        text += piece.choices[0]?.delta?.content ?? "";
        usage = piece.usage ?? usage;
      }
      assert.equal(text, whole.choices[0].message.content);
      assert.equal(usage.completion_tokens, whole.usage.completion_tokens);
      assert.match(whole._request_id, /^req_/);
    },
    async tools() {
      const client = await openai(), asked = { model: TOOLS, messages: ASKED, max_tokens: 60, temperature: 0 };
      const stream = client.chat.completions.stream({ ...asked, tools: [WEATHER], tool_choice: "required", parallel_tool_calls: false });
      const [call] = (await stream.finalChatCompletion()).choices[0].message.tool_calls;
      assert.deepEqual(JSON.parse(call.function.arguments), { city: "Paris" });
      const own = { type: "function", function: { ...WEATHER.function, parse: JSON.parse, function: ({ city }) => "18 C in " + city } };
      const runner = client.chat.completions.runTools({ ...asked, tools: [own], tool_choice: BY_NAME });
      await runner.done();
      assert.deepEqual(runner.messages.map(m => m.role).slice(0, 3), ["user", "assistant", "tool"]);
    },
    async parsed() {
      const client = await openai(), { z } = await load("zod"), { zodResponseFormat, zodTextFormat } = await load("openai/helpers/zod");
      const person = z.object({ name: z.string().max(10), age: z.number().int().min(0).max(150) });
      const chat = await client.chat.completions.parse({ model: TOOLS, messages: BOB, response_format: zodResponseFormat(person, "person"), max_tokens: 60, temperature: 0 });
      assert.equal(chat.choices[0].message.parsed.age, 5);
      const made = await client.responses.parse({ model: TOOLS, input: BOB, text: { format: zodTextFormat(person, "person") }, max_output_tokens: 60, temperature: 0 });
      assert.equal(made.output_parsed.age, 5);
    },
    async responses() {
      const client = await openai(), stream = client.responses.stream({ model: CHAT, input: "Name a river.", max_output_tokens: 16, temperature: 0 }), kinds = [];
      for await (const event of stream) kinds.push(event.type);
      assert.equal(kinds[0], "response.created");
      assert((await stream.finalResponse()).output_text);
    },
    async embeddings() {
      const client = await openai(), coded = await client.embeddings.create({ model: CHAT, input: ["a", "b"] });
      const plain = await client.embeddings.create({ model: CHAT, input: "a", encoding_format: "float" });
      assert.equal(coded.data.length, 2);
      assert(coded.data[0].embedding.every((x, i) => Math.abs(x - plain.data[0].embedding[i]) < 1e-6));
    },
    async errors() {
      const client = await openai(), { NotFoundError, BadRequestError } = await load("openai");
      await assert.rejects(client.chat.completions.create({ model: "nope", messages: RIVER }), NotFoundError);
      await assert.rejects(client.chat.completions.create({ model: CHAT, messages: [] }), e => e instanceof BadRequestError && e.param == "messages");
      const names = [];
      for await (const model of client.models.list()) names.push(model.id);
      assert.equal(names.length, 3);
    },
    async aborted() {
      const client = await openai(), { APIUserAbortError, APIConnectionTimeoutError } = await load("openai"), control = new AbortController();
      for await (const _ of await client.chat.completions.create({ model: TOOLS, messages: STORY, stream: true })) break;
      await comesToRest();
      setTimeout(() => control.abort(), 400);
      await assert.rejects(client.chat.completions.create({ model: TOOLS, messages: STORY }, { signal: control.signal }), APIUserAbortError);
      await comesToRest();
      await assert.rejects(client.chat.completions.create({ model: TOOLS, messages: STORY }, { timeout: 200 }), APIConnectionTimeoutError);
      await comesToRest();
    },
  },
  ai: {
    async text() {
      const { kinds, generateText, streamText } = await ai();
      for (const of of Object.values(kinds)) {
        const whole = await generateText({ model: of(CHAT), system: "Be brief.", prompt: "Name a river.", ...few });
        const stream = streamText({ model: of(CHAT), system: "Be brief.", prompt: "Name a river.", ...few });
        let text = "";
        for await (const piece of stream.textStream) text += piece;
        assert.equal(text, whole.text);
        assert((await stream.usage).outputTokens > 0);
        const turns = [{ role: "user", content: "Name a river." }, ...whole.response.messages, { role: "user", content: "Another?" }];
        assert((await generateText({ model: of(CHAT), messages: turns, ...few })).text);
      }
    },
    async steps() {
      const { kinds, generateText, streamText, stepCountIs, tools } = await ai();
      for (const of of Object.values(kinds)) {
        const asked = { model: of(TOOLS), tools, prompt: ASKED[0].content, ...more, stopWhen: stepCountIs(2), prepareStep: firstByName };
        const whole = await generateText(asked);
        assert.equal(whole.steps.length, 2);
        assert.deepEqual(whole.steps[0].toolResults[0].output, { city: "Paris", degrees: 18 });
        const seen = new Set();
        for await (const part of streamText({ ...asked, onError: ({ error }) => { throw error; } }).fullStream) seen.add(part.type);
        for (const kind of ["tool-input-delta", "tool-call", "tool-result", "finish"]) assert(seen.has(kind), kind);
      }
    },
    async objects() {
      const { kinds, generateObject, streamObject, generateText, Output, person } = await ai();
      for (const of of Object.values(kinds)) {
        const asked = { model: of(TOOLS), schema: person, prompt: BOB[0].content, ...more };
        assert.equal((await generateObject(asked)).object.age, 5);
        const stream = streamObject(asked);
        for await (const _ of stream.partialObjectStream);
        assert.equal((await stream.object).age, 5);
        assert.equal((await generateText({ model: of(TOOLS), output: Output.object({ schema: person }), prompt: BOB[0].content, ...more })).output.age, 5);
      }
    },
    async pictures() {
      const { kinds, generateText } = await ai();
      const content = [{ type: "image", image: square(), mediaType: "image/png" }, { type: "text", text: "what shapes are there?" }];
      for (const of of Object.values(kinds)) assert((await generateText({ model: of(SEES), messages: [{ role: "user", content }], ...few })).text);
    },
    async embeds() {
      const { embedMany, first, second } = await ai();
      for (const of of [first, second]) assert.equal((await embedMany({ model: of.textEmbeddingModel(CHAT), values: ["a", "b"], maxRetries: 0 })).embeddings.length, 2);
    },
    async logprobs() {
      const { generateText, first } = await ai(), providerOptions = { openai: { logprobs: 2 } };
      assert((await generateText({ model: first.chat(CHAT), prompt: "Hi", ...few, providerOptions })).providerMetadata.openai.logprobs.length > 0);
      assert((await generateText({ model: first(CHAT), prompt: "Hi", ...few, providerOptions })).providerMetadata.openai.logprobs[0].length > 0);
    },
    async errors() {
      const { kinds, generateText } = await ai();
      for (const of of Object.values(kinds)) await assert.rejects(generateText({ model: of("nope"), prompt: "x", maxRetries: 0 }), e => e.statusCode == 404 && /nope/.test(e.message));
    },
    async aborted() {
      const { first, streamText } = await ai(), control = new AbortController();
      let n = 0;
      for await (const _ of streamText({ model: first.chat(TOOLS), prompt: STORY[0].content, abortSignal: control.signal, onError() {} }).fullStream) if (++n == 5) control.abort();
      await comesToRest();
    },
  },
  ollama: {
    async all() {
      const { Ollama } = await load("ollama"), client = new Ollama({ host: url }), options = { temperature: 0, num_predict: 8 };
      const whole = await client.chat({ model: CHAT, messages: RIVER, options });
      let text = "";
      for await (const piece of await client.chat({ model: CHAT, messages: RIVER, options, stream: true })) text += piece.message.content;
      assert.equal(text, whole.message.content);
      const called = await client.chat({ model: TOOLS, messages: ASKED, tools: [WEATHER], options: { temperature: 0, num_predict: 60 } });
      assert.deepEqual(called.message.tool_calls[0].function.arguments, { city: "Paris" });
      assert((await client.generate({ model: SEES, prompt: "what shapes are there?", images: [square()], options })).response);
      assert.equal((await client.embed({ model: CHAT, input: ["a", "b"] })).embeddings.length, 2);
      assert.equal((await client.list()).models.length, 3);
      assert((await client.show({ model: SEES })).capabilities.includes("vision"));
      await assert.rejects(client.chat({ model: "nope", messages: RIVER }), e => e.status_code == 404);
    },
    async aborted() {
      const { Ollama } = await load("ollama"), client = new Ollama({ host: url }), stream = await client.chat({ model: TOOLS, messages: STORY, stream: true });
      await assert.rejects(async () => { for await (const _ of stream) client.abort(); }, e => e.name == "AbortError");
      await comesToRest();
    },
  },
  "@anthropic-ai/sdk": {
    async messages() {
      const { default: Anthropic, NotFoundError } = await load("@anthropic-ai/sdk"), client = new Anthropic({ baseURL: url, apiKey: "none", maxRetries: 0 });
      assert((await client.messages.create({ model: CHAT, max_tokens: 8, messages: RIVER })).content[0].text);
      const tools = [{ name: "get_weather", description: "Get the weather of a city.", input_schema: CITY }];
      const made = await client.messages.stream({ model: TOOLS, max_tokens: 60, messages: ASKED, tools, tool_choice: { type: "tool", name: "get_weather" } }).finalMessage();
      assert.equal(made.stop_reason, "tool_use");
      assert.equal((await client.models.list()).data.length, 3);
      await assert.rejects(client.messages.create({ model: "nope", max_tokens: 1, messages: RIVER }), NotFoundError);
    },
  },
};

if (url == "--list") console.log(JSON.stringify(Object.fromEntries(Object.entries(cases).map(([name, own]) => [name, Object.keys(own)]))));
else await cases[packageName][caseName]();
